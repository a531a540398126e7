"""Plain depthwise convolutions that our kernels compute: which ones, and that nothing else changes."""

import pytest
import torch
from torch import nn

from contextual_cnn.models import build_model
from contextual_cnn.models.depthwise import DepthwiseConv2d, can_be_ours
from contextual_cnn.settings.model import ModelSettings
from tests.helpers.fake_cuda import run_under_autocast


def built(name, **settings):
    torch.manual_seed(0)
    return build_model(ModelSettings(name=name, num_classes=10, **settings))


def ours(model):
    return [name for name, module in model.named_modules() if isinstance(module, DepthwiseConv2d)]


@pytest.mark.parametrize("name", ["convnext_atto", "contextual_convnext_atto"])
def test_a_model_is_the_same_with_either(name):
    """Names, weights and, on a CPU, bits."""
    first, second = built(name).eval(), built(name, depthwise="cudnn").eval()
    assert list(first.state_dict()) == list(second.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(first(images, **staged(name)), second(images, **staged(name)))
    blocks = [block for block in ours(first) if block.endswith("conv_dw")]
    assert len(blocks) == sum(block.endswith("conv_dw") for block in plain_convolutions(second)) > 5


def staged(name):
    return {"staged": False} if name.startswith("contextual") else {}


def plain_convolutions(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Conv2d]


def test_the_layer_that_makes_sampling_offsets_is_always_ours():
    model = built("contextual_convnext_atto", depthwise="cudnn")
    assert ours(model)
    assert all(name.endswith("sampling_offset.out") for name in ours(model))
    assert not ours(built("contextual_convnext_atto", depthwise="cudnn", context_layers="released"))  # it is dense


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035"])
def test_dense_and_small_convolutions_stay_as_they_are(name):
    assert not ours(built(name))


@pytest.mark.parametrize(
    ("same", "options"),
    [
        (True, {}),
        (False, dict(stride=2)),
        (False, dict(dilation=2)),
        (False, dict(padding="same")),
        (False, dict(padding=(3, 2))),
        (False, dict(padding_mode="circular")),
        (False, dict(groups=4)),
    ],
    ids=str,
)
def test_what_the_kernels_compute(same, options):
    assert can_be_ours(nn.Conv2d(8, 8, 7, **dict(padding=3, groups=8) | options)) == same


def test_on_a_gpu_plain_layers_follow_autocast_and_offsets_stay_exact(monkeypatch):
    """The tensors of the test are fake ones."""
    from contextual_cnn.models import depthwise

    given = []
    real = depthwise.depthwise_conv2d

    def noted(x, weight, bias, **options):
        y = real(x, weight, bias, **options)
        given.append((x.device.type, x.dtype, y.dtype, x.shape[1]))
        return y

    monkeypatch.setattr(depthwise, "depthwise_conv2d", noted)
    with torch.device("meta"):
        model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=1000))
    run_under_autocast(model)
    offsets = [dtypes for device, *dtypes, channels in given if channels == 98]
    plain = [dtypes for device, *dtypes, channels in given if channels != 98]
    assert {device for device, *_ in given} == {"cuda"}
    assert offsets
    assert all(y == torch.float32 for _, y in offsets)
    assert plain
    assert all(dtypes == [torch.bfloat16, torch.bfloat16] for dtypes in plain)

"""The layers that take a plain convolution's place, under autocast: every kind computes in bfloat16.

On a GPU this decides which kernels run. There need not be one: fake tensors have types and shapes, and autocast treats
them as real ones.
"""

from typing import get_args

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from contextual_cnn.models.contextual_conv import Convolution, _Replacement, replace_convolution
from tests.conftest import wake_up
from tests.helpers.fake_cuda import run_under_autocast
from tests.helpers.small_models import small

KINDS = [kind for kind in get_args(Convolution) if kind != "plain"]
LAYERS = {"contextual_convnext_atto": 3, "contextual_resnet50": 4}
SAMPLING = {"contextual", "sampling_offsets", "without_prior", "deformable"}
LOW = torch.bfloat16


class SampledMaps(TorchDispatchMode):
    """Notes the type of every map that the sampled convolution gets."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.contextual_cnn.sampled_conv2d.default:
            self.types.append(args[0].dtype)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_gpu_every_layer_computes_in_autocasts_type(name, kind):
    pytest.importorskip("triton")  # the plain torch form is no operator whose input could be seen
    with torch.device("meta"):
        model = timm.create_model(name, convolution=kind, **small(name))
    given: list[torch.dtype] = []
    for layer in model.modules():
        if isinstance(layer, _Replacement):
            layer.register_forward_hook(lambda layer, inputs, output: given.append(output.dtype))
    sampled = SampledMaps()
    run_under_autocast(model, sampled)
    assert given == [LOW] * LAYERS[name]
    depthwise = "convnext" in name
    # A dense layer's static part is torchvision's operator, in float32; what is sampled is its weight offsets' part
    through_our_operator = kind in (SAMPLING if depthwise else SAMPLING - {"sampling_offsets", "deformable"})
    assert sampled.types == [LOW] * LAYERS[name] * through_our_operator


def layer_of(kind: str, groups: int) -> nn.Module:
    layer = wake_up(replace_convolution(nn.Conv2d(8, 8, 3, padding=1, groups=groups), kind, 4))
    layer.takes_context = kind not in ("deformable", "without_prior")
    return layer


def call(layer: nn.Module, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    return layer(x, context) if layer.takes_context else layer(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [8, 1], ids=["depthwise", "dense"])
def test_autocast_lowers_the_output_and_no_gradient(kind, groups):
    layer, context = layer_of(kind, groups), torch.randn(2, 4)
    images = torch.randn(2, 8, 6, 7)
    gradients = []
    for enabled in (False, True):
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", LOW, enabled=enabled):
            y = call(layer, x, context)
        assert y.dtype == (LOW if enabled else torch.float32)
        gradients.append(torch.autograd.grad(y.float().square().sum(), [x, layer.weight]))
    for exact, low in zip(*gradients, strict=True):
        assert low.dtype == torch.float32
        assert (low - exact).norm() < 0.2 * exact.norm()
    assert call(layer.double(), images.double(), context.double()).dtype == torch.float64


@pytest.mark.parametrize("kind", ["contextual", "deformable"])
def test_a_compiled_layer_follows_autocast(kind):
    layer, x, context = layer_of(kind, 8), torch.randn(2, 8, 6, 7), torch.randn(2, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled.takes_context = layer.takes_context
    for enabled in (True, False, True):
        with torch.autocast("cpu", LOW, enabled=enabled):
            assert_close(call(compiled, x, context), call(layer, x, context))

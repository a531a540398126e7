"""What may be chosen about the context does what it says, and none of it costs the exact start from plain weights."""

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from contextual_cnn.contracts import StagedScores
from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.models.class_context import Merging
from contextual_cnn.models.contextual_conv import ContextualConv2d, Generators, WeightOffset
from contextual_cnn.settings.model import ModelSettings
from tests.conftest import wake_up
from tests.helpers.commands import composed
from tests.helpers.commands import fresh_hydra as _fresh_hydra  # noqa: F401 - a fixture
from tests.helpers.small_models import small

SWITCHES = {
    "context_norm": "batch",
    "context_init": "trunc_normal",
    "merge": "scores",
    "context_of": "blind",
    "generator_norm": "batch",
    "generator_width": 8,
    "offset_bias": False,
    "convolution": "scale_shift",
    "context_layers": "released",
}
BACKBONES = ["convnext_atto", "resnet50"]


def build(twin="convnext_atto", **options):
    return build_model(ModelSettings(name=f"contextual_{twin}", num_classes=10, timm_options=small(twin), **options))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("twin", BACKBONES)
def test_a_fresh_model_of_any_choice_is_its_plain_twin(tmp_path, twin, switch):
    plain = timm.create_model(twin, **small(twin), num_classes=10).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = build(twin, weights=str(tmp_path / "plain.pth"), **{switch: SWITCHES[switch]}).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain.forward_features(images)
        assert_close(model.forward_features(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_every_parameter_learns_with_all_cures_at_once():
    others = ("context_of", "convolution", "context_layers")
    cures = {key: value for key, value in SWITCHES.items() if key not in others}
    model = wake_up(build(layer_scale=1.0, **cures))
    for layer in model.modules():
        if isinstance(layer, WeightOffset):
            assert layer.out.bias is None
            assert layer.out.in_features >= 8
    scores = model(torch.randn(6, 3, 64, 64))
    sum(logits.square().mean() for logits in scores.logits).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# Counted once by building the models of the released code (commit 167050e of aliyun/Contextual-Convolutional-Networks)
# with 1000 classes and the defaults of its main.py. A block is contextual every 3 in a ConvNeXt, as in its run.sh.
RELEASED = {
    ("released_t",): 33_949_668,
    ("released_t", "model=contextual_convnext_s"): 59_611_494,
    ("released_t", "model=contextual_convnext_b"): 104_159_810,
    ("released_r50",): 27_971_582,
    ("released_r50", "model.contextual_every=1"): 29_555_744,
}


@pytest.mark.parametrize("experiment", RELEASED, ids=" ".join)
def test_the_released_models_have_as_many_parameters_as_the_released_code(experiment):
    name, *overrides = experiment
    settings = composed(f"experiment={name}", *overrides)["model"] | {"num_classes": 1000}
    with torch.device("meta"):
        model = build_model(ModelSettings(**settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == RELEASED[experiment]


@pytest.mark.parametrize("twin", BACKBONES)
def test_released_layers_depend_on_the_width_of_the_stages_convolutions(twin):
    model = build(twin, context_layers="released", mask=True)
    for stage, blocks in enumerate(model.stage_blocks(), start=1):
        layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, ContextualConv2d)]
        for conv in layers:
            channels, taps = conv.sampling_offset.from_features.in_channels, conv.taps
            maps = conv.sampling_offset.out
            assert (maps.out_channels, maps.groups, conv.mask) == (3 * taps, 1, None)
            assert maps.in_channels == conv.weight_offset.out.in_features == channels // (16 if taps == 49 else 4)
            assert model.mergings[str(stage)].after[0].out_features == channels // 2
            assert model.projections[str(stage)][2].out_features == channels
        assert bool(layers) == (stage > 1)


@pytest.mark.parametrize("twin", BACKBONES)
def test_a_released_layer_makes_the_mask_of_its_last_maps(twin):
    """With a bias there alone, 2 sigmoid(bias) weighs each tap, which the kernel could do as well."""
    torch.manual_seed(0)
    model = build(twin, context_layers="released", mask=True, generator_norm="batch").eval()
    conv = next(layer for layer in model.modules() if isinstance(layer, ContextualConv2d))
    factors = torch.randn(conv.taps)
    x, context = torch.randn(2, conv.weight_offset.out.out_features // conv.taps, 8, 8), torch.randn(2, 512)
    context = context[:, : conv.sampling_offset.from_context.in_features]
    with torch.no_grad():
        conv.sampling_offset.out.bias[2 * conv.taps :] = factors
        masked = conv(x, context)
        conv.sampling_offset.out.bias.zero_()
        conv.weight.mul_(2 * factors.sigmoid().view(conv.weight.shape[2:]))
        assert_close(masked, conv(x, context))


@pytest.mark.parametrize("twin", BACKBONES)
def test_every_parameter_of_released_layers_learns(twin):
    model = wake_up(build(twin, context_layers="released", mask=True))
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bn3.weight")):
            nn.init.ones_(parameter)
    sum(logits.square().mean() for logits in model(torch.randn(6, 3, 64, 64)).logits).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("kind", ["weight_offsets", "sampling_offsets", "extra_input", "scale_shift", "without_prior"])
def test_released_layers_go_with_every_row_of_the_ablations(kind):
    scores = build(context_layers="released", convolution=kind, mask=True)(torch.randn(2, 3, 64, 64))
    assert StagedScores.of(scores).logits[-1].shape == (2, 10)


def test_a_batch_norm_takes_out_of_a_generator_what_all_images_share():
    conv = nn.Conv2d(128, 128, 7, padding=3, groups=128)
    alike = 5 * torch.rand(1, 128, 1, 1) + 0.1 * torch.randn(64, 128, 1, 1)

    def spread(norm):
        torch.manual_seed(0)
        hidden = WeightOffset(conv, 0, Generators(norm=norm)).hidden(alike.flatten(1))
        return hidden.var(dim=0).sum() / hidden.mean(dim=0).square().sum()

    assert spread("layer") < 0.1
    assert spread("batch") > 1


def test_the_released_initialisation_tells_classes_apart():
    """Relative variance of the contexts of random shortlists, 50 of 1000: ten times as large, and more."""

    def spread(init):
        torch.manual_seed(0)
        model = build(context_init=init)
        table = 0.02 * torch.randn(1000, 256)
        shortlists = torch.stack([torch.randperm(1000)[:50] for _ in range(64)])
        contexts = model.mergings["2"](table, shortlists)
        return contexts.var(dim=0).sum() / contexts.mean(dim=0).square().sum()

    assert spread("trunc_normal") > 10 * spread("uniform")
    linear = [
        layer for layer in build(context_init="trunc_normal").projections.modules() if isinstance(layer, nn.Linear)
    ]
    assert all(layer.bias.abs().max() == 0 and layer.weight.std() < 0.03 for layer in linear)


def test_scores_weigh_the_classes_of_a_shortlist():
    merging = Merging(16)
    table, scores = torch.randn(7, 16), torch.randn(2, 7, requires_grad=True)
    shortlist = torch.tensor([[0, 3, 6], [2, 1, 5]])
    context = merging(table, shortlist, scores)
    expected = [
        merging.after((merging.before(table[kept]) * of[kept].softmax(0)[:, None]).sum(0))
        for kept, of in zip(shortlist, scores, strict=True)
    ]
    assert_close(context, torch.stack(expected))
    (gradient,) = torch.autograd.grad(context[0].sum(), scores)
    kept = torch.zeros(2, 7, dtype=torch.bool)
    kept[0, shortlist[0]] = True  # a class that is not kept has no say, nor has another image
    assert gradient[~kept].abs().max() == 0
    assert gradient[kept].abs().min() > 0


@pytest.fixture
def merged():
    """Runs a model; returns the classes (B, k) that each merging got, and the scores."""

    def watch(model, images, **told):
        seen = []
        hooks = [
            merging.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
            for merging in model.mergings.values()
        ]
        with torch.no_grad():
            scores = model(images, staged=True, **told)
        for hook in hooks:
            hook.remove()
        return seen, scores

    return watch


def test_a_told_model_finds_the_truth_in_every_shortlist(merged):
    model, images = build(context_of="told", class_counts=[5, 3, 1]).eval(), torch.randn(6, 3, 64, 64)
    own, scores = merged(model, images)
    assert [set(map(tuple, a.tolist())) for a in own] == [set(map(tuple, b.tolist())) for b in scores.shortlists]
    truth = torch.tensor([0, 9, 4, -1, 7, 2])  # of the fourth image nothing is known
    told, scores = merged(model, images, told=truth)
    for before, after in zip(own, told, strict=True):
        known = truth >= 0
        assert (after == truth[:, None]).any(1)[known].all()
        assert torch.equal(after[~known], before[~known])
    # In the first, where both have seen the same features, only the least likely class has made room
    assert torch.equal(told[0][:, :-1], own[0][:, :-1])
    was_there = (own[0] == truth[:, None]).any(1)
    assert torch.equal(told[0][was_there], own[0][was_there])
    # What is reported stays the model's own
    assert torch.equal(scores.shortlists[0], own[0])


def test_a_blind_model_merges_all_classes_for_every_image(merged):
    model = build(context_of="blind").eval()
    seen, scores = merged(model, torch.randn(3, 3, 64, 64))
    assert all(torch.equal(classes, torch.arange(10).expand(3, -1)) for classes in seen)
    assert [shortlist.shape[1] for shortlist in scores.shortlists] == list(model.class_counts)


@pytest.mark.parametrize("switch", [key for key in SWITCHES if key not in ("generator_width", "offset_bias")])
def test_a_choice_that_there_is_not_is_refused(switch):
    with pytest.raises(ValueError, match=switch):
        timm.create_model("contextual_convnext_atto", **{switch: "none such"})


def test_a_control_of_a_model_without_context_is_refused():
    with pytest.raises(UserError, match=r"context_of='told': convolution='plain' has no context"):
        build(context_of="told", convolution="plain")

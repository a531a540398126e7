"""Contextual ConvNeXt and ResNet: drop-ins for their plain twins, staged in training, dense in evaluation."""

import os
from typing import get_args

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from torchvision.ops import deform_conv2d

from contextual_cnn.contracts import StagedScores, is_considered
from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.models.context_options import WITHOUT_CONTEXT
from contextual_cnn.models.contextual_conv import ContextualConv2d, DeformableConv2d
from contextual_cnn.models.resnet import ContextualBottleneck
from contextual_cnn.settings.model import Convolution, ModelSettings
from tests.conftest import wake_up
from tests.helpers.small_models import small

SIZES = ["atto", "tiny", "small", "base"]


def atto(**options):
    name = "contextual_convnext_atto"
    return build_model(ModelSettings(name=name, num_classes=10, timm_options=small(name), **options))


@pytest.mark.parametrize("layout", ["timm .pth", "timm .safetensors", "original ConvNeXt"])
def test_plain_weights_make_an_exact_drop_in(tmp_path, layout):
    twin = "convnext_tiny" if layout == "original ConvNeXt" else "convnext_atto"
    plain = timm.create_model(twin, **small(twin), num_classes=1000).eval()
    state = plain.state_dict()
    if layout == "original ConvNeXt":
        state = {"model": as_original(state)}
    path = tmp_path / ("weights.safetensors" if "safetensors" in layout else "weights.pth")
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    given = dict(weights=str(path), timm_options=small(twin))
    model = build_model(ModelSettings(name=f"contextual_{twin}", num_classes=10, **given)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(model.forward_features(images), plain.forward_features(images), rtol=1e-5, atol=1e-5)


KINDS = get_args(Convolution)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("twin", ["resnet50", "convnext_atto"])
def test_a_fresh_model_of_any_kind_is_its_plain_twin(tmp_path, twin, kind):
    plain = timm.create_model(twin, **small(twin), num_classes=10).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    options = dict(convolution=kind, weights=str(tmp_path / "plain.pth"), timm_options=small(twin))
    model = build_model(ModelSettings(name=f"contextual_{twin}", num_classes=10, **options)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain.forward_features(images)
        assert_close(model.forward_features(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        if kind in WITHOUT_CONTEXT:
            assert_close(model(images), plain(images), rtol=1e-4, atol=1e-4)


def test_the_deformable_kind_is_torchvisions_operator():
    for conv in (torch.nn.Conv2d(4, 6, 3, 2, 1, bias=False), torch.nn.Conv2d(4, 4, 3, 1, 2, 2, groups=4)):
        layer, x = DeformableConv2d(conv), torch.randn(2, 4, 9, 8)
        torch.nn.init.normal_(layer.offset_mask.weight, std=0.3)
        offset, mask = layer.offset_mask(x).split([18, 9], dim=1)
        geometry = (conv.stride, conv.padding, conv.dilation)
        expected = deform_conv2d(x, offset, conv.weight, conv.bias, *geometry, mask=2 * mask.sigmoid())
        assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_every_kind_learns(kind):
    model = wake_up(atto(layer_scale=1.0, convolution=kind))
    scores = StagedScores.of(model(torch.randn(4, 3, 64, 64)))
    sum(logits.square().mean() for logits in scores.logits).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("stages", [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4), (2, 4)])
@pytest.mark.parametrize("selection", ["rerank", "reduce"])
def test_any_choice_of_contextual_stages(stages, selection):
    model = wake_up(atto(contextual_stages=stages, class_counts=[6, 4, 2], selection=selection))
    for i, stage in enumerate(model.stages, start=1):
        assert any(isinstance(block.conv_dw, ContextualConv2d) for block in stage.blocks) == (i in stages)
    scores = model(torch.randn(3, 3, 64, 64))
    kept = [{2: 6, 3: 4, 4: 2}[stage] for stage in stages if stage > 1]
    assert scores.stages == (*(stage - 1 for stage in stages if stage > 1), 4)
    assert model.shortlist_sizes == dict(zip(scores.stages[:-1], kept, strict=True))
    assert [shortlist.shape[1] for shortlist in scores.shortlists] == kept
    assert [is_considered(logits).sum().item() // 3 for logits in scores.logits] == (
        [10, *kept] if selection == "reduce" else [10] * (len(kept) + 1)
    )


@pytest.mark.parametrize("stages", [(), (0, 1), (4, 3), (5,), (2, 2)])
def test_stages_that_there_are_not_are_refused(stages):
    with pytest.raises(UserError, match="contextual_stages"):
        atto(contextual_stages=stages)


def test_contextual_resnet50_modulates_the_3x3_convolutions_of_layers_2_to_4():
    with torch.device("meta"):
        model = timm.create_model("contextual_resnet50")
        sparse = timm.create_model("contextual_resnet50", contextual_every=2)
    for of, expected in ((model, [0, 4, 6, 3]), (sparse, [0, 2, 3, 2])):
        found = [sum(isinstance(block, ContextualBottleneck) for block in blocks) for blocks in of.stage_blocks()]
        assert found == expected
    assert model.layer2[0].conv2.geometry == {"stride": 2, "padding": 1, "dilation": 1}
    assert model.layer2[0].conv2.weight_offset.out.out_features == 128 * 9


def as_original(state):
    """timm's names -> those of the ConvNeXt repository."""

    def rename(key):
        for new, old in (
            ("stem.", "downsample_layers.0."),
            (".blocks.", "."),
            ("conv_dw", "dwconv"),
            ("mlp.fc", "pwconv"),
            ("head.norm", "norm"),
            ("head.fc", "head"),
        ):
            key = key.replace(new, old)
        if ".downsample." in key:
            stage, rest = key.removeprefix("stages.").split(".downsample.")
            return f"downsample_layers.{stage}.{rest}"
        return key

    return {rename(key): value for key, value in state.items()}


def test_training_gives_stages_and_evaluation_dense_logits():
    model = atto(class_counts=[6, 4, 2])
    images = torch.randn(3, 3, 64, 64)
    scores = model(images)
    assert isinstance(scores, StagedScores)
    assert [tuple(logits.shape) for logits in scores.logits] == [(3, 10)] * 4
    assert [tuple(shortlist.shape) for shortlist in scores.shortlists] == [(3, 6), (3, 4), (3, 2)]
    with torch.no_grad():
        assert model.eval()(images).shape == (3, 10)
        assert isinstance(model(images, staged=True), StagedScores)


def test_shortlists_are_the_highest_scores():
    model = wake_up(atto(class_counts=[6, 4, 2])).eval()
    scores = model.forward_stages(torch.randn(5, 3, 64, 64))
    for logits, shortlist in zip(scores.logits, scores.shortlists, strict=False):
        dropped = torch.ones_like(logits, dtype=torch.bool).scatter_(1, shortlist, False)
        kept_worst = logits.gather(1, shortlist).min(dim=1).values
        assert (kept_worst >= logits.masked_fill(~dropped, -torch.inf).max(dim=1).values).all()


def test_rerank_scores_all_classes_at_every_stage():
    scores = atto(selection="rerank").forward_stages(torch.randn(3, 3, 64, 64))
    assert all(is_considered(logits).all() for logits in scores.logits)


def test_reduce_considers_only_what_the_stage_before_kept():
    model = wake_up(atto(selection="reduce", class_counts=[6, 4, 2])).eval()
    scores = model.forward_stages(torch.randn(5, 3, 64, 64))
    assert is_considered(scores.logits[0]).all()
    for logits, before in zip(scores.logits[1:], scores.shortlists, strict=True):
        expected = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, before, True)
        assert torch.equal(is_considered(logits), expected)
    images = torch.randn(5, 3, 64, 64)
    dense, last_shortlist = model(images), model.forward_stages(images).shortlists[-1]
    assert dense.isneginf().sum(dim=1).tolist() == [8] * 5
    assert (dense.argmax(dim=1, keepdim=True) == last_shortlist).any(dim=1).all()


def test_context_changes_the_features():
    """The modulation is alive: the opposite shortlist gives other features."""
    model = wake_up(atto(layer_scale=1.0)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model.forward_features(images)
        model.class_embeddings.weight.neg_()
        assert not torch.allclose(before, model.forward_features(images), rtol=1e-3, atol=1e-3)


def test_renaming_the_classes_changes_nothing_else():
    model = wake_up(atto(layer_scale=1.0)).eval()
    images, order = torch.randn(2, 3, 64, 64), torch.randperm(10)
    with torch.no_grad():
        features, logits = model.forward_features(images), model(images)
        model.class_embeddings.weight.copy_(model.class_embeddings.weight[order])
        assert_close(model.forward_features(images), features)
        assert_close(model(images), logits[:, order])


def test_every_parameter_learns():
    model = wake_up(atto(layer_scale=1.0, class_counts=[6, 4, 2], mask=True))
    scores = model(torch.randn(4, 3, 64, 64))
    sum(logits.square().mean() for logits in scores.logits).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a mask generator's hidden layers get gradients once its zero-initialised last layer has moved
    assert [name for name in silent if ".mask." not in name or ".mask.out." in name] == []


def test_fresh_mask_changes_nothing():
    torch.manual_seed(1)
    with_mask = atto(mask=True).eval()
    without = atto().eval()
    without.load_state_dict({k: v for k, v in with_mask.state_dict().items() if ".mask." not in k})
    images = torch.randn(2, 3, 64, 64)
    assert_close(with_mask(images), without(images))


def test_gradient_checkpointing_changes_no_gradient():
    images = torch.randn(2, 3, 64, 64)
    model, gradients = wake_up(atto()), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).logits[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(plain, recomputed)


@pytest.mark.parametrize("size", SIZES)
def test_one_of_three_blocks_of_stages_2_to_4_is_contextual(size):
    with torch.device("meta"):
        model = timm.create_model(f"contextual_convnext_{size}")
        plain = timm.create_model(f"convnext_{size}")
    for i, (stage, plain_stage) in enumerate(zip(model.stages, plain.stages, strict=True)):
        contextual = [j for j, block in enumerate(stage.blocks) if isinstance(block.conv_dw, ContextualConv2d)]
        assert contextual == ([] if i == 0 else list(range(0, len(plain_stage.blocks), 3)))


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (0, 3, 64, 64), (2, 3, 65, 97)])
def test_any_image_and_batch_size(shape):
    scores = atto().eval()(torch.randn(shape), staged=True)
    assert scores.logits[-1].shape == (shape[0], 10)
    assert scores.logits[-1].isfinite().all()


def test_bfloat16_autocast_keeps_scores_in_float32():
    model = wake_up(atto()).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(images)
    assert logits.dtype == torch.float32
    assert (logits - model(images)).abs().max() < 1.0  # logits of about +-14, bfloat16 has 8 bits


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training):
    """By inductor, gradients included: tests/end_to_end/test_scripts.py, the GPU check on a CPU."""
    model = wake_up(atto()).train(training)
    images = torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(training):
        expected = model(images, staged=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, staged=True)
    assert_close(compiled.logits[-1], expected.logits[-1], rtol=1e-3, atol=1e-3)
    assert compiled.stages == expected.stages == (1, 2, 3, 4)


MISTAKES = {
    "unknown model": dict(name="contextual_convnxt_t"),
    "class counts": dict(name="contextual_convnext_atto", class_counts=[10, 6, 6]),
    "option of another model": dict(name="convnext_atto", class_counts=[6, 4, 2]),
    "no such file": dict(name="convnext_atto", weights="/nowhere/weights.pth"),
    "no option of timm's": dict(name="convnext_atto", timm_options={"patchsize": 2}),
    "unknown norm": dict(name="contextual_convnext_atto", projection_norm="group"),
}


@pytest.mark.parametrize("name", ["contextual_convnext_atto", "convnext_atto"])
def test_timms_own_options_reach_the_backbone(name):
    model = build_model(
        ModelSettings(name=name, num_classes=10, timm_options={"patch_size": 2, "depths": [1, 1, 1, 1]})
    )
    assert model.stem[0].stride == (2, 2)
    assert [len(stage.blocks) for stage in model.stages] == [1, 1, 1, 1]


@pytest.mark.parametrize("options", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_explained(options):
    with pytest.raises(UserError) as error:
        build_model(ModelSettings(num_classes=10, **options))
    assert error.value.cause
    assert error.value.fix


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet18").state_dict(), path)
    with pytest.raises(UserError, match=r"model\.weights.*resnet\.pth"):
        atto(weights=str(path))


def test_damaged_or_hostile_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    for content in (b"", b"not a checkpoint", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueq\x85R."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.weights.*weights\.pth"):
            atto(weights=str(path))


def test_weights_that_want_to_run_code_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)

    torch.save({"stem.0.weight": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(UserError):
        build_model(
            ModelSettings(name="contextual_convnext_atto", num_classes=4, weights=str(tmp_path / "weights.pth"))
        )
    assert not (tmp_path / "was_run").exists()

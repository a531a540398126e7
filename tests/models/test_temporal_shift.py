"""The temporal shift: as published, under the plain names, and nothing where there is nothing to shift."""

import pytest
import timm
import torch
from torch.testing import assert_close

from contextual_cnn.batch_plan import BatchPlan, NormPlan
from contextual_cnn.contracts import StagedScores
from contextual_cnn.engine.batch_norms import BatchNorms
from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.models.temporal_shift import FrozenBatchNorm2d, ShiftedConv2d, fit_to_clips, temporal_shift
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.model import ModelSettings
from tests.conftest import wake_up
from tests.helpers.small_models import small

FRAMES = 4


def resnet(name="contextual_resnet50", clip=None, **options):
    model = build_model(ModelSettings(name=name, num_classes=10, timm_options=small("resnet50"), **options)).eval()
    for block in (module for module in model.modules() if hasattr(module, "bn3")):
        torch.nn.init.ones_(block.bn3.weight)  # it starts at 0, and so does all that a shift could change
    if clip is not None:
        fit_to_clips(model, clip)
    return model


def published(x, frames, shift_div):
    """The formula of the module's repository, line by line."""
    clips = x.view(-1, frames, *x.shape[1:])
    fold = x.shape[1] // shift_div
    out = torch.zeros_like(clips)
    out[:, :-1, :fold] = clips[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    return out.view(x.shape)


@pytest.mark.parametrize("channels", [8, 12, 17])
@pytest.mark.parametrize("frames", [1, 2, 8])
def test_it_is_the_published_formula(frames, channels):
    x = torch.randn(3 * frames, channels, 5, 4)
    assert torch.equal(temporal_shift(x, frames, 8), published(x, frames, 8))
    assert torch.equal(temporal_shift(x, frames, 4), published(x, frames, 4))


def test_it_keeps_the_memory_format_and_has_a_gradient():
    x = torch.randn(8, 16, 2, 1, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    assert temporal_shift(x, FRAMES, 8).is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.gradcheck(lambda x: temporal_shift(x, FRAMES, 8), x)


@pytest.mark.parametrize("name", ["contextual_resnet50", "resnet50"])
def test_a_shifted_model_has_the_plain_names_and_takes_the_plain_weights(name):
    plain, shifted = resnet(name), resnet(name, ClipSettings(frames=FRAMES))
    assert list(plain.state_dict()) == list(shifted.state_dict())
    shifted.load_state_dict(plain.state_dict())
    convolutions = [module for module in shifted.modules() if isinstance(module, ShiftedConv2d)]
    assert len(convolutions) == sum(small("resnet50")["layers"])


@pytest.mark.parametrize(("name", "shifted"), [("resnet50", 16), ("resnet101", 2 + 2 + 12 + 2)])
def test_every_bottleneck_is_shifted_and_every_second_one_of_a_deep_resnet(name, shifted):
    with torch.device("meta"):
        model = timm.create_model(name)
    fit_to_clips(model, ClipSettings())
    found = [module for module in model.modules() if isinstance(module, ShiftedConv2d)]
    assert len(found) == shifted
    assert all(module.kernel_size == (1, 1) for module in found)


@pytest.mark.parametrize("name", ["contextual_resnet50", "resnet50"])
def test_a_still_frame_far_from_the_ends_is_an_image(name):
    """A shift reaches one frame, so the ends reach as far as there are blocks; beyond that all neighbours are alike."""
    blocks = sum(small("resnet50")["layers"])
    plain, shifted = resnet(name), resnet(name, ClipSettings(frames=2 * blocks + 1))
    shifted.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        features = shifted.forward_features(image.repeat(2 * blocks + 1, 1, 1, 1))
        assert_close(features[blocks], plain.forward_features(image)[0])
    assert not torch.allclose(features[0], features[blocks], rtol=1e-2)


def test_the_order_of_the_frames_counts_only_with_the_shift():
    images = torch.randn(2 * FRAMES, 3, 32, 32)
    backwards = images.unflatten(0, (2, FRAMES)).flip(1).flatten(0, 1)
    for shift_div, differs in ((8, True), (None, False)):
        model = wake_up(resnet(clip=ClipSettings(frames=FRAMES, shift_div=shift_div)))
        with torch.no_grad():
            forth, back = (model(x).unflatten(0, (2, FRAMES)).mean(1) for x in (images, backwards))
        assert (not torch.allclose(forth, back, atol=1e-5)) == differs


def test_a_context_of_a_clip_is_one_for_all_its_frames():
    model = wake_up(resnet(clip=ClipSettings(frames=FRAMES), context_of="clip"))
    own = wake_up(resnet(clip=ClipSettings(frames=FRAMES)))
    own.load_state_dict(model.state_dict())
    images = torch.randn(2 * FRAMES, 3, 32, 32)
    with torch.no_grad():
        scores, single = StagedScores.of(model(images, staged=True)), StagedScores.of(own(images, staged=True))
    for logits, shortlist in zip(scores.logits[:-1], scores.shortlists, strict=True):
        best = logits.unflatten(0, (2, FRAMES)).mean(1).topk(shortlist.shape[1]).indices
        assert torch.equal(shortlist.unflatten(0, (2, FRAMES)).sort(-1)[0][:, 0], best.sort(-1)[0])
        assert (shortlist.unflatten(0, (2, FRAMES)) == shortlist[::FRAMES].unsqueeze(1)).all()
    assert_close(scores.logits[0], single.logits[0])  # the first classification has no context yet
    assert not torch.allclose(scores.logits[-1], single.logits[-1])


def test_frames_may_not_drop_classes_one_by_one():
    with pytest.raises(UserError, match=r"model\.selection=reduce") as refused:
        resnet(clip=ClipSettings(), selection="reduce")
    assert "model.context_of=clip" in refused.value.fix
    resnet(clip=ClipSettings(), selection="reduce", context_of="clip")


def test_a_model_without_bottlenecks_is_refused_with_what_works():
    model = build_model(ModelSettings(name="convnext_atto", num_classes=10))
    with pytest.raises(UserError, match="temporal shift") as refused:
        fit_to_clips(model, ClipSettings())
    assert "clip.shift_div=null" in refused.value.fix
    fit_to_clips(model, ClipSettings(shift_div=None))


@pytest.mark.parametrize("name", ["resnet50", "contextual_resnet50"])
def test_partial_bn_trains_the_first_batch_norm_alone(name):
    """All others normalise as in evaluation, and nothing of theirs moves."""
    plain, partial = resnet(name, ClipSettings(frames=FRAMES)), resnet(name)
    partial.load_state_dict(plain.state_dict())
    fit_to_clips(partial, ClipSettings(frames=FRAMES, partial_bn=True))
    x = torch.randn(2 * FRAMES, 3, 64, 64)
    assert_close(logits_of(partial.eval(), x), logits_of(plain.eval(), x))
    norms = [module for module in partial.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [isinstance(norm, FrozenBatchNorm2d) for norm in norms] == [False] + [True] * (len(norms) - 1)
    before = {key: value.clone() for key, value in partial.state_dict().items()}
    partial.train()
    logits_of(partial, x).sum().backward()
    moved = {key for key, value in partial.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[0] for key in moved if "projection" not in key} == {"bn1"}
    assert norms[0].weight.grad is not None
    assert all(norm.weight.grad is None and not norm.weight.requires_grad for norm in norms[1:])
    assert list(partial.state_dict()) == list(plain.state_dict())


def logits_of(model, x):
    return StagedScores.of(model(x)).logits[-1]


def test_the_loop_leaves_frozen_batch_norms_alone():
    model = resnet(clip=ClipSettings(frames=FRAMES, partial_bn=True))
    plan = BatchPlan.make(images=16, global_batch=8, micro_batch=8, world_size=1)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    frozen = [norm for norm in norms if isinstance(norm, FrozenBatchNorm2d)]
    assert len(BatchNorms(model, plan, NormPlan(8, 1, 1))) == len(norms) - len(frozen)
    assert all(type(norm) is FrozenBatchNorm2d for norm in frozen)

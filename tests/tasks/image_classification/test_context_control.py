"""Contexts that are exchanged, averaged or taken away, against the same by hand."""

from types import SimpleNamespace

import pytest
import torch

from contextual_cnn.contracts import Batch
from contextual_cnn.distributed import World
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.tasks.image_classification.context_control import ControlledEvaluation
from tests.conftest import wake_up
from tests.helpers.small_models import small

CPU = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = small("convnext_atto")
    settings = ModelSettings(name="contextual_convnext_atto", num_classes=5, layer_scale=1.0, timm_options=options)
    return wake_up(build_model(settings)).eval()


@pytest.fixture(scope="module")
def batches():
    draw = torch.Generator().manual_seed(0)
    return [Batch(torch.randn(4, 3, 32, 32, generator=draw), torch.arange(4)) for _ in range(2)]


class Batches(list):
    images = 8


def controlled(model, batches, control, stages=None, observe=None):
    data = SimpleNamespace(evaluation_batches=lambda world: Batches(batches))
    evaluation = ControlledEvaluation(data, CPU, None, observe, control=control, stages=stages)
    return evaluate({"model": model}, {"model": model}, evaluation, CPU)["model"]


@torch.no_grad()
def by_hand(model, images, replace, stages):
    """The final logits where `replace` changes the contexts: the model's own steps, one after the other."""
    x, shortlists = model.forward_stem(images), []
    for stage, blocks in enumerate(model.stage_blocks(), start=1):
        context = model._context(stage, x, shortlists, [], None) if stage in model.contextual_stages else None
        if stage in stages:
            context = replace(context)
        for block in blocks:
            x = model._forward_block(block, x, context)
        if stage < 4:
            scores = model.class_embeddings(model.projections[str(stage)](x))
            shortlists.append(scores.topk(model.class_counts[stage - 1], dim=1).indices)
    return model.forward_head(x)


REPLACED = {
    "swap": lambda context: torch.cat([context[-1:], context[:-1]]),
    "mean": lambda context: context.mean(0).repeat(len(context), 1),
    "zero": lambda context: 0 * context,
}


@pytest.mark.parametrize("stages", [None, [2, 3], [4]], ids=["all", "two", "the last"])
@pytest.mark.parametrize("control", REPLACED)
def test_the_figures_are_those_of_the_changed_contexts(model, batches, control, stages):
    found = controlled(model, batches, control, stages)
    own, other, targets = [], [], []
    for batch in batches:
        own.append(by_hand(model, batch.images, None, ()))
        other.append(by_hand(model, batch.images, REPLACED[control], stages or (2, 3, 4)))
        targets.append(batch.targets)
    own, other, targets = map(torch.cat, (own, other, targets))
    assert found["top1"] == pytest.approx(100 * (own.argmax(1) == targets).float().mean().item())
    assert found["controlled_top1"] == pytest.approx(100 * (other.argmax(1) == targets).float().mean().item())
    assert found["controlled_answers"] == pytest.approx(100 * (own.argmax(1) != other.argmax(1)).float().mean().item())
    own, other = (logits - logits.mean(1, keepdim=True) for logits in (own, other))
    assert found["controlled_logits"] == pytest.approx(100 * ((own - other).norm() / own.norm()).item(), rel=1e-4)
    assert found["controlled_logits"] > 0.01


def test_a_model_that_does_not_read_its_contexts_shows_it(batches):
    """A fresh one, whose generators end in zeros."""
    settings = ModelSettings(name="contextual_convnext_atto", num_classes=5, timm_options=small("convnext_atto"))
    found = controlled(build_model(settings).eval(), batches, "swap")
    assert (found["controlled_logits"], found["controlled_answers"]) == (0, 0)
    assert found["controlled_top1"] == found["top1"]


def test_the_model_is_left_as_it_was_and_seen_once(model, batches):
    seen = []
    controlled(model, batches, "zero", observe=lambda targets, logits: seen.append(len(targets)))
    assert seen == [4, 4]
    assert not any(merging._forward_hooks for merging in model.mergings.values())


@pytest.mark.parametrize(
    ("name", "stages"),
    [("convnext_atto", None), ("contextual_convnext_atto", [1]), ("contextual_convnext_atto", [2, 5])],
)
def test_a_context_that_is_not_there_is_refused(batches, name, stages):
    model = build_model(ModelSettings(name=name, num_classes=5, timm_options=small("convnext_atto")))
    with pytest.raises(UserError, match="context=swap") as refused:
        controlled(model, batches, "swap", stages)
    assert "context=own" in refused.value.fix

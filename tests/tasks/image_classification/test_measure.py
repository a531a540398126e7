"""Evaluation counts; it does not average averages."""

import math

import pytest
import torch

from contextual_cnn.contracts import Batch, StagedScores
from contextual_cnn.distributed import World
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.models import build_model
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.tasks.image_classification.hits import labels_of, stage_hits, top_hits
from contextual_cnn.tasks.image_classification.measure import Accuracy
from tests.conftest import wake_up

WORLD = World(0, 1, 0, torch.device("cpu"))


class Pass:
    """Some batches as a whole split."""

    def __init__(self, batches, samples, *options):
        self.batches, self.samples, self._options = batches, samples, options

    def measure(self, model):
        return Accuracy(model, WORLD, *self._options)


def evaluated(model, batches, samples, *options):
    return evaluate({"raw": model}, {"raw": model}, Pass(batches, samples, *options), WORLD)["raw"]


def batches(sizes, classes=10):
    return [Batch(torch.randn(n, 3, 32, 32), torch.randint(classes, (n,))) for n in sizes]


def test_uneven_batches_are_counted_as_one_pass_of_images():
    model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=10))
    data = batches((5, 3, 1))
    split = evaluated(model, data, 9)
    whole = Batch(torch.cat([b.images for b in data]), torch.cat([b.targets for b in data]))
    together = evaluated(model, [whole], 9)
    with torch.no_grad():
        scores = model.eval()(whole.images, staged=True)
    assert (
        split["top1"]
        == together["top1"]
        == pytest.approx(100 * (scores.logits[-1].argmax(1) == whole.targets).float().mean().item())
    )
    assert split["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(scores.logits[-1], whole.targets).item(), rel=1e-5
    )
    for i, shortlist in enumerate(scores.shortlists, start=1):
        kept = [whole.targets[b].item() in shortlist[b].tolist() for b in range(9)]
        assert split[f"recall_stage{i}"] == pytest.approx(100 * sum(kept) / 9)


def test_a_told_model_is_told_in_an_evaluation_too():
    """The recall stays that of its own shortlists."""
    torch.manual_seed(0)
    settings = ModelSettings(
        name="contextual_convnext_atto", num_classes=10, class_counts=[3, 2, 1], context_of="told", layer_scale=1.0
    )
    model = wake_up(build_model(settings)).eval()
    (batch,) = batches((8,))
    with torch.no_grad():
        told = model(batch.images, staged=True, told=batch.targets)
        own = model(batch.images, staged=True)
    assert not torch.allclose(told.logits[-1], own.logits[-1])
    report = evaluated(model, [batch], 8)
    loss = torch.nn.functional.cross_entropy
    assert report["loss"] == pytest.approx(loss(told.logits[-1], batch.targets).item(), rel=1e-5)
    assert report["recall_stage1"] == 100 * stage_hits(own, batch.targets)["recall_stage1"].item() / 8 < 100


@pytest.mark.parametrize(("contextual", "named"), [((4,), {3}), ((2, 4), {1, 3}), ((1, 2, 3, 4), {1, 2, 3})])
def test_recall_is_named_by_the_stage_that_made_the_shortlist(contextual, named):
    """These names alone, so that a rank without images, which names its sums by the model, has the same."""
    model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=10, contextual_stages=contextual))
    report = evaluated(model, batches((3,)), 3)
    assert {name for name in report if name.startswith("recall")} == {f"recall_stage{stage}" for stage in named}


def test_the_loss_is_finite_where_classes_have_been_dropped():
    model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=10, selection="reduce"))
    (batch,) = batches((40,))
    report = evaluated(model, [batch], 40)
    with torch.no_grad():
        logits = model.eval()(batch.images)
    kept = [b for b in range(40) if logits[b, batch.targets[b]] != -torch.inf]
    assert 0 < len(kept) < 40
    expected = torch.nn.functional.cross_entropy(logits[kept], batch.targets[kept]).item()
    assert report["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_image_lost_or_counted_twice_is_noticed():
    model = build_model(ModelSettings(name="convnext_atto", num_classes=10))
    for sizes in ((4,), (4, 2)):
        with pytest.raises(RuntimeError, match=r"split.*\b5\b"):
            evaluated(model, batches(sizes), 5)


def test_models_return_in_their_mode_and_without_images_nothing_breaks():
    model = build_model(ModelSettings(name="convnext_atto", num_classes=3)).train()
    evaluated(model, batches((2,), 3), 2)
    assert model.training


def test_a_prediction_among_some_of_the_classes_by_hand():
    """As ImageNet-A and -R are evaluated: the best of the classes that are there, whatever the others' scores."""
    model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=10))
    subset = [7, 2, 4]
    (batch,) = (Batch(torch.randn(30, 3, 32, 32), torch.tensor(subset * 10)),)
    among, observed = torch.zeros(10, dtype=torch.bool), []
    among[subset] = True
    report = evaluated(model, [batch], 30, among, lambda targets, logits: observed.append(logits))
    with torch.no_grad():
        logits = model.eval()(batch.images)
    hits, losses = 0, []
    for scores, target in zip(logits.tolist(), batch.targets.tolist(), strict=True):
        hits += max(subset, key=lambda c: scores[c]) == target
        total = sum(math.exp(scores[c]) for c in subset)
        losses.append(-math.log(math.exp(scores[target]) / total))
    assert report["top1"] == pytest.approx(100 * hits / 30)
    assert report["top1"] != pytest.approx(100 * (logits.argmax(1) == batch.targets).float().mean().item())
    assert report["top5"] == 100  # of three
    assert report["loss"] == pytest.approx(sum(losses) / 30, rel=1e-4)
    (seen,) = observed
    assert (seen[:, ~among] == -torch.inf).all()
    assert torch.equal(seen[:, among], logits[:, among])


def test_hits():
    logits = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.4, 0.1]])
    labels = torch.tensor([1, 2])
    assert {name: int(count) for name, count in top_hits(logits, labels).items()} == {"top1": 1, "top5": 2}
    scores = StagedScores((logits, logits), (torch.tensor([[1, 0], [0, 1]]),), (3, 4))
    assert {name: int(count) for name, count in stage_hits(scores, labels).items()} == {"recall_stage3": 1}
    assert labels_of(torch.tensor([[0.2, 0.8], [0.6, 0.4]])).tolist() == [1, 0]

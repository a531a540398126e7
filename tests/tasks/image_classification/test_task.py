"""What the task says of a run; the loop itself is run by the commands of test_command_line.py."""

from types import SimpleNamespace

import pytest
import torch

from contextual_cnn.contracts import Batch, StagedScores
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.tasks.image_classification.task import ImageClassification
from tests.helpers.facts import tells

STEP = {"loss": 5.0, "loss_stage3": 2.0, "loss_stage4": 3.0, "recall_stage3": 61.0}


def test_a_shortlist_no_better_than_chance_is_named_by_its_stage():
    model = build_model(
        ModelSettings(name="contextual_convnext_atto", num_classes=10, contextual_stages=[3, 4], class_counts=[8, 4, 2])
    )
    task = SimpleNamespace(data=SimpleNamespace(num_classes=10))
    (remark,) = ImageClassification.remarks(task, model, {"recall_stage2": 41.0, "recall_stage3": 90.0})
    assert "stage 2" in remark
    assert "41.0 %" in remark
    assert "40.0 %" in remark


@pytest.mark.parametrize(("context_of", "told"), [("told", {"told": [3, 1]}), (None, {}), ("blind", {})])
def test_only_a_told_model_is_given_the_classes(context_of, told):
    """Of mixed images the class with the largest share, as the hits are counted."""
    given = []

    def call(images, **keywords):
        given.append({name: values.tolist() for name, values in keywords.items()})
        return StagedScores.of(torch.zeros(2, 4))

    settings = SimpleNamespace(model=SimpleNamespace(context_of=context_of))
    task = SimpleNamespace(settings=settings, _loss=StagedCrossEntropy())
    mixed = torch.tensor([[0.0, 0.4, 0.0, 0.6], [0.1, 0.9, 0.0, 0.0]])
    for targets in (mixed, torch.tensor([3, 1])):
        ImageClassification.forward(task, call, Batch(torch.zeros(2, 3, 8, 8), targets))
    assert given == [told, told]


def test_a_step_and_an_evaluation_name_the_stage_of_each_figure():
    assert ImageClassification.describe_step(None, STEP) == "loss 5.000 (s3 2.00 s4 3.00), recall s3 61 %"
    assert ImageClassification.describe_step(None, {"loss": 5.0, "loss_stage4": 5.0}) == "loss 5.000"
    report = {"top1": 50.0, "top5": 80.0, "recall_stage2": 90.0, "recall_stage3": 70.0}
    told = ImageClassification.describe_evaluation(None, {"raw": report})
    assert tells(told, "s2", "90", "s3", "70")

"""The training loop's own remarks; the loop itself is run by the commands of test_command_line.py."""

from types import SimpleNamespace

from contextual_cnn.engine.trainer import Trainer
from contextual_cnn.models import build_model
from contextual_cnn.settings.model import ModelSettings


def test_a_shortlist_no_better_than_chance_is_named_by_its_stage(caplog):
    model = build_model(
        ModelSettings(name="contextual_convnext_atto", num_classes=10, contextual_stages=[3, 4], class_counts=[8, 4, 2])
    )
    trainer = SimpleNamespace(train_step=SimpleNamespace(module=model), data=SimpleNamespace(num_classes=10))
    Trainer._warn_of_collapse(trainer, {"recall_stage2": 41.0, "recall_stage3": 90.0})
    (warning,) = caplog.records
    assert warning.args == (2, 41.0, 40.0)

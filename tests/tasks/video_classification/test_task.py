"""What the task of videos refuses before it trains."""

from types import SimpleNamespace

import pytest

from contextual_cnn.errors import UserError
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.loss import LossSettings
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.tasks.video_classification.settings import VideoClassificationSettings
from contextual_cnn.tasks.video_classification.task import VideoClassification


def test_batch_norms_that_keep_what_nothing_brings_are_refused():
    settings = VideoClassificationSettings(
        model=ModelSettings(name="resnet50", num_classes=2),
        data=DataSettings(root=""),
        loss=LossSettings(),
        clip=ClipSettings(partial_bn=True),
    )
    task = VideoClassification(settings, SimpleNamespace(num_classes=2, sources={}))
    with pytest.raises(UserError, match=r"partial_bn=true keeps the batch norms of model\.weights") as error:
        task.build_model()
    assert "model.weights=FILE" in error.value.fix

"""The groups of keys of video classification, and its data as they are found before torch is loaded."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.video.video_data import VideoData
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.loss import LossSettings
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.tasks.image_classification.settings import with_num_classes

if TYPE_CHECKING:  # it brings torch
    from contextual_cnn.tasks.video_classification.task import VideoClassification


@dataclass(frozen=True, kw_only=True)
class VideoClassificationSettings:
    """A model of frames, the videos, the clips that are taken from them, and the staged loss."""

    model: ModelSettings
    data: DataSettings
    clip: ClipSettings
    loss: LossSettings

    def open(self) -> "OpenVideoClassification":
        """Opens the data. Raises UserError for what is not there, or not as it should be."""
        return OpenVideoClassification(self)

    @staticmethod
    def evaluator() -> ModuleType:
        """What evaluates a checkpoint; imports torch and timm, which takes seconds."""
        from contextual_cnn.tasks.video_classification import evaluation

        return evaluation


class OpenVideoClassification:
    """The videos have been found.

    Raises:
        UserError: they are not there, or have another number of classes than model.num_classes.
    """

    def __init__(self, settings: VideoClassificationSettings) -> None:
        self.data = VideoData(settings.data, settings.clip)
        self.samples = len(self.data.sources["train"])
        self.settings = replace(settings, model=with_num_classes(settings.model, self.data))

    def check(self, plan: BatchPlan) -> None:
        """Any batch will do."""

    def load(self) -> "VideoClassification":
        """The task; imports torch, timm and the models, which takes seconds."""
        from contextual_cnn.tasks.video_classification.task import VideoClassification

        return VideoClassification(self.settings, self.data)

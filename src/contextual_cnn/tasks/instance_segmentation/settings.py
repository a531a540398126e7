"""The groups of keys of instance segmentation, and its data as they are found before torch is loaded."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.detection.coco_data import CocoData
from contextual_cnn.settings.coco import CocoSettings
from contextual_cnn.settings.detector import DetectorSettings
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.scale_augment import ScaleAugmentSettings

if TYPE_CHECKING:  # it brings torch
    from contextual_cnn.tasks.instance_segmentation.task import InstanceSegmentation

_IMAGENET = 1000


@dataclass(frozen=True, kw_only=True)
class InstanceSegmentationSettings:
    """A backbone, what makes a detector of it, the data, and the size at which an image is shown.

    `model.num_classes` is of the context, the classes that the backbone was trained for; null takes those of
    `model.weights`, or ImageNet's 1000; those of the data where the detector teaches them ("multilabel").
    """

    model: ModelSettings
    detector: DetectorSettings
    data: CocoSettings
    augment: ScaleAugmentSettings

    def open(self) -> "OpenInstanceSegmentation":
        """Opens the data. Raises UserError for what is not there, or not as it should be."""
        return OpenInstanceSegmentation(self)

    @staticmethod
    def evaluator() -> ModuleType:
        """What evaluates a checkpoint; imports torch and timm, which takes seconds."""
        from contextual_cnn.tasks.instance_segmentation import evaluation

        return evaluation


class OpenInstanceSegmentation:
    """The data have been found.

    Raises:
        UserError: they are not there.
    """

    def __init__(self, settings: InstanceSegmentationSettings) -> None:
        self.data = CocoData(settings.data)
        self.samples = len(self.data.sources["train"])
        self.settings = settings

    def check(self, plan: BatchPlan) -> None:
        """Any batch will do."""

    def load(self) -> "InstanceSegmentation":
        """The task; imports torch, timm and the models, which takes seconds.

        Raises:
            UserError: weights that cannot be read.
        """
        from contextual_cnn.models.weights import classes_of_weights
        from contextual_cnn.tasks.instance_segmentation.task import InstanceSegmentation

        model = self.settings.model
        if model.num_classes is None:
            found = classes_of_weights(model.weights) if model.weights is not None else None
            if self.settings.detector.context == "multilabel":
                found = len(self.data.classes)
            self.settings = replace(self.settings, model=replace(model, num_classes=found or _IMAGENET))
        return InstanceSegmentation(self.settings, self.data)

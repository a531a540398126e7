"""The groups of keys of image classification, and its data as they are found before torch is loaded."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.errors import UserError
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.loss import LossSettings
from contextual_cnn.settings.model import ModelSettings

if TYPE_CHECKING:  # it brings torch
    from contextual_cnn.tasks.image_classification.task import ImageClassification


@dataclass(frozen=True, kw_only=True)
class ImageClassificationSettings:
    """A model, its data, what is done to a training image, and the staged loss."""

    model: ModelSettings
    data: DataSettings
    augment: AugmentSettings
    loss: LossSettings

    def open(self) -> "OpenImageClassification":
        """Opens the data. Raises UserError for what is not there, or not as it should be."""
        return OpenImageClassification(self)

    @staticmethod
    def evaluator() -> ModuleType:
        """What evaluates a checkpoint; imports torch and timm, which takes seconds."""
        from contextual_cnn.tasks.image_classification import evaluation

        return evaluation


def with_num_classes(model: ModelSettings, data: ImageData) -> ModelSettings:
    """The settings of a model for these data. Raises UserError for another number of classes."""
    wanted, found = model.num_classes, data.num_classes
    if wanted not in (None, found):
        raise UserError(
            f"model.num_classes={wanted}, but {data.settings.root} has {found} classes",
            "model.num_classes=null takes the number from the data",
        )
    return replace(model, num_classes=found)


class OpenImageClassification:
    """The data have been found.

    Raises:
        UserError: the data are not there, or have another number of classes than model.num_classes.
    """

    def __init__(self, settings: ImageClassificationSettings) -> None:
        self.data = ImageData(settings.data)
        self.samples = len(self.data.sources["train"])
        self.settings = replace(settings, model=with_num_classes(settings.model, self.data))

    def check(self, plan: BatchPlan) -> None:
        """Raises UserError for a micro-batch that cannot be mixed."""
        self.settings.augment.check_micro_batch(plan.micro_batch)

    def load(self) -> "ImageClassification":
        """The task; imports torch, timm and the models, which takes seconds."""
        from contextual_cnn.tasks.image_classification.task import ImageClassification

        return ImageClassification(self.settings, self.data)

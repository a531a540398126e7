"""Image classification as the training loop sees it (sections 3.1 and 4.1)."""

from collections.abc import Iterator

from contextual_cnn.contracts import Batch
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.mixing import BatchAugmentation
from contextual_cnn.randomness import Places
from contextual_cnn.task import Position
from contextual_cnn.tasks.image_classification.classification import Classification
from contextual_cnn.tasks.image_classification.settings import ImageClassificationSettings


class ImageClassification(Classification):
    """Of images that are augmented one by one and mixed on the device."""

    def __init__(self, settings: ImageClassificationSettings, data: ImageData) -> None:
        super().__init__(settings, data)
        self._augment = BatchAugmentation(settings.augment, data.num_classes)

    def batches(self, position: Position) -> Iterator[Batch]:
        """Images (B, 3, H, W) float32 and their classes (B,), from a position on."""
        return self.data.train_batches(
            position.plan, self.settings.augment, position.seed, position.world, position.step
        )

    def prepare(self, batch: Batch, places: Places | None) -> Batch:
        """Erased and mixed images; targets (B, N) if anything mixes or smooths."""
        return self._augment(batch, places)

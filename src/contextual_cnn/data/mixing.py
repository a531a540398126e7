"""What is done to a batch of training samples on its device: erasing, mixing and smoothing."""

from timm.data import Mixup

from contextual_cnn.contracts import Batch
from contextual_cnn.data.random_erasing import erase_randomly
from contextual_cnn.settings.augment import AugmentSettings


class BatchAugmentation:
    """Erasing, and timm's mixing and label smoothing, on the batch's device.

    They draw from the global generators, which the caller seeds for each micro-batch (`randomness.seed_all`).
    """

    def __init__(self, settings: AugmentSettings, num_classes: int) -> None:
        self.erasing = settings.erasing
        self.mix = None
        if settings.mixes or settings.label_smoothing:
            self.mix = Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                prob=settings.mix_prob if settings.mixes else 0.0,  # 0: smoothing alone
                switch_prob=settings.mix_switch_prob,
                mode=settings.mix_mode,
                label_smoothing=settings.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, batch: Batch) -> Batch:
        """(B, 3, H, W) images, (B,) classes -> erased and mixed images, (B, N) targets if anything mixes or smooths."""
        images = erase_randomly(batch.images, self.erasing) if self.erasing else batch.images
        targets = batch.targets
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        return Batch(images, targets, batch.replaced)

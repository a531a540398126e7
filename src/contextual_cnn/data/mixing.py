"""What is done to a batch of training samples on its device: erasing, mixing and smoothing."""

from itertools import pairwise

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from contextual_cnn.contracts import Batch
from contextual_cnn.data.random_erasing import erase_randomly
from contextual_cnn.data.transfer import to_device
from contextual_cnn.randomness import Places, Purpose, seed_numpy
from contextual_cnn.settings.augment import AugmentSettings

MIXED_TOGETHER = 128  # places that share a draw where the recipe mixes batch by batch: its micro-batch


class BatchAugmentation:
    """Erasing, and timm's mixing and label smoothing, on the batch's device."""

    def __init__(self, settings: AugmentSettings, num_classes: int) -> None:
        self.erasing = settings.erasing
        self._together = MIXED_TOGETHER if settings.mix_mode == "batch" else 2
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

    def __call__(self, batch: Batch, places: Places | None) -> Batch:
        """(B, 3, H, W) images, (B,) classes -> erased and mixed images, (B, N) targets if anything mixes or smooths.

        Args:
            places: by which all is drawn. None: by the global generators, as runs of DRAWS 1 did.
        """
        images, targets = batch.images, batch.targets
        if self.erasing:
            images = erase_randomly(images, self.erasing, places)
        if self.mix is not None:
            images, targets = self.mix(images, targets) if places is None else self._mix_places(images, targets, places)
        return Batch(images, targets, batch.replaced)

    def _mix_places(self, images: Tensor, targets: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Mixes the sample of each even place with the next one, by what is drawn for their group of places.

        A micro-batch of any even size holds whole pairs, so that no share depends on how the places are shared out.
        """
        assert self.mix is not None
        first, end = places.first, places.first + places.count
        borders = [first, *range(first - first % self._together + self._together, end, self._together), end]
        mixed = []
        for start, stop in pairwise(borders):
            seed_numpy(Purpose.MIXING, places.seed, places.step, start // self._together)
            inside = slice(start - first, stop - first)
            mixed.append(self._mix_neighbours(images[inside], targets[inside]))
        together, soft = zip(*mixed, strict=True)
        return (together[0], soft[0]) if len(mixed) == 1 else (torch.cat(together), torch.cat(soft))

    def _mix_neighbours(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """timm mixes the first with the last: neighbours are put there, and back."""
        assert self.mix is not None
        count = len(images)
        order = np.concatenate([np.arange(0, count, 2), np.arange(1, count, 2)[::-1]])
        there, back = (to_device(places, images.device) for places in (order, np.argsort(order)))
        mixed, soft = self.mix(images[there], targets[there])
        return mixed[back], soft[back]

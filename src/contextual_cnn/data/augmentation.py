"""What is done to an image before it is a training sample: what is drawn, and with which numbers.

Crop, flip and RandAugment (or color jitter) are drawn as numbers per image that depend on (seed, epoch, place in
the epoch) alone, and carried out by the pipeline; erasing, mixing and smoothing act on the batch, on its device.
Order as in the ConvNeXt recipe: crop, flip, RandAugment, normalise, erase each sample, then mix the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from timm.data import Mixup

from contextual_cnn.contracts import Batch
from contextual_cnn.data.randaugment import ColorJitter, ImageOps, RandAugment
from contextual_cnn.data.random_erasing import erase_randomly
from contextual_cnn.data.sampler import MicroBatch
from contextual_cnn.errors import UserError
from contextual_cnn.randomness import Purpose, uniform_rows

ATTEMPTS = 10  # torchvision's and timm's number of tries at a random crop before the fallback
_COLUMNS = 2 * ATTEMPTS + 4  # area and aspect of each attempt, row, column, flip, and one to a multiple of four


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The recipe's numbers; the defaults are ConvNeXt's.

    scale, ratio: random resized crop, share of the area and range of the aspect ratio.
    hflip: probability of a horizontal flip.
    randaugment: in timm's notation, `rand-m9-mstd0.5-inc1`; None is off.
    interpolation: of RandAugment's geometry; timm's recipe is bicubic, bilinear is the cheaper default.
    color_jitter: largest change of brightness, contrast and saturation; as in timm it means nothing beside RandAugment.
    erasing: probability that a sample has a rectangle replaced by noise (timm's RandomErasing, per pixel).
    mixup, cutmix: alpha of the Beta distribution; 0 turns one off. mix_prob, mix_switch_prob, mix_mode: as timm's Mixup
        (one share for the whole batch, for each pair of images, or for each image).
    label_smoothing: share of the target spread over all classes.
    """

    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    color_jitter: float = 0.4
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.randaugment is not None:
            RandAugment.parse(self.randaugment)
        if not 0 <= self.color_jitter < math.inf:
            raise UserError(f"augment.color_jitter is 0 or more, got {self.color_jitter}", "augment.color_jitter=0")
        for key in ("hflip", "erasing", "mix_prob", "mix_switch_prob", "label_smoothing"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(
                    f"augment.{key} is a share between 0 and 1, got {getattr(self, key)}",
                    f"augment.{key}=0 turns it off",
                )
        for key in ("mixup", "cutmix"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(
                    f"augment.{key} is 0 or more, got {getattr(self, key)}", f"augment.{key}=0 turns it off"
                )
        for key in ("scale", "ratio"):
            low_high = getattr(self, key)
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] < math.inf:
                raise UserError(
                    f"augment.{key} is [low, high] with 0 < low <= high, got {list(low_high)}",
                    f"augment.{key}=[0.5,1.0]",
                )

    @property
    def policy(self) -> RandAugment | ColorJitter | None:
        """What draws the operations on an image's levels and geometry."""
        if self.randaugment is not None:
            return RandAugment.parse(self.randaugment)
        return ColorJitter(self.color_jitter) if self.color_jitter else None

    @property
    def mixes(self) -> bool:
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def check_micro_batch(self, size: int) -> None:
        """Raises UserError for a micro-batch that cannot be mixed: an image is mixed with its mirror place."""
        if (self.mixes or self.label_smoothing) and size % 2:
            raise UserError(
                f"mixing needs an even micro-batch, got {size}",
                f"trainer.micro_batch_size={size + 1}, or augment=none",
            )


@dataclass(frozen=True)
class Draws:
    """The numbers for the images of one micro-batch, in the layout that the pipeline reads.

    height, width: (n, 10) float32, each attempt's sides over the square root of the image's area.
    place: (n, 2) float32 in [0, 1), row and column of the crop within the room it has.
    flip: (n,) int32.
    ops: None without RandAugment and color jitter.
    """

    height: np.ndarray
    width: np.ndarray
    place: np.ndarray
    flip: np.ndarray
    ops: ImageOps | None


def draw(augmentation: Augmentation, seed: int, batch: MicroBatch) -> Draws:
    """The draws of a micro-batch's images; another cut into micro-batches draws the same for each image."""
    u = uniform_rows(Purpose.IMAGE, seed, batch.epoch, start=batch.start, rows=len(batch.indices), columns=_COLUMNS)
    low, high = augmentation.scale
    side = np.sqrt(low + (high - low) * u[:, :ATTEMPTS])
    low, high = (math.log(bound) for bound in augmentation.ratio)
    stretch = np.exp((low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS]) / 2)  # square root of the aspect ratio
    policy = augmentation.policy
    return Draws(
        height=(side / stretch).astype(np.float32),
        width=(side * stretch).astype(np.float32),
        place=u[:, 2 * ATTEMPTS : 2 * ATTEMPTS + 2].astype(np.float32),
        flip=(u[:, 2 * ATTEMPTS + 2] < augmentation.hflip).astype(np.int32),
        ops=policy.draw(seed, batch.epoch, batch.start, len(batch.indices)) if policy is not None else None,
    )


def crop_box(draws: Draws, i: int, height: int, width: int, ratio: Sequence[float]) -> tuple[int, int, int, int]:
    """timm's RandomResizedCrop: the first attempt that fits the image, else the largest central crop within `ratio`.

    Computed in float32, as the DALI graph does.

    Returns:
        top, left, height, width.
    """
    side = np.sqrt(np.float32(height) * np.float32(width))
    heights, widths = (np.floor(side * sides[i] + np.float32(0.5)) for sides in (draws.height, draws.width))
    fits = np.flatnonzero((np.minimum(heights, widths) > 0) & (heights <= height) & (widths <= width))
    if len(fits):
        crop_height, crop_width = int(heights[fits[0]]), int(widths[fits[0]])
        room = (height - crop_height, width - crop_width)
        top, left = (
            min(int(np.floor(place * np.float32(r + 1))), r) for place, r in zip(draws.place[i], room, strict=True)
        )
        return top, left, crop_height, crop_width
    crop_height = min(height, math.floor(width / ratio[0] + 0.5))
    crop_width = min(width, math.floor(height * ratio[1] + 0.5))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


class BatchAugmentation:
    """Erasing, and timm's mixing and label smoothing, on the batch's device.

    They draw from the global generators, which the caller seeds for each micro-batch (`randomness.seed_all`).
    """

    def __init__(self, augmentation: Augmentation, num_classes: int) -> None:
        self.erasing = augmentation.erasing
        self.mix = None
        if augmentation.mixes or augmentation.label_smoothing:
            self.mix = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                prob=augmentation.mix_prob if augmentation.mixes else 0.0,  # 0: smoothing alone
                switch_prob=augmentation.mix_switch_prob,
                mode=augmentation.mix_mode,
                label_smoothing=augmentation.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, batch: Batch) -> Batch:
        """(B, 3, H, W) images, (B,) classes -> erased and mixed images, (B, N) targets if anything mixes or smooths."""
        images = erase_randomly(batch.images, self.erasing) if self.erasing else batch.images
        return Batch(*self.mix(images, batch.targets)) if self.mix is not None else Batch(images, batch.targets)

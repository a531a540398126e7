"""What is drawn for an image before it is a training sample: numbers, no pixels.

Crop, flip and RandAugment (or color jitter) are drawn as numbers per image that depend on (seed, epoch, place in
the epoch) alone, and carried out by the pipeline. What acts on the batch, on its device, is in mixing.py.
Order as in the ConvNeXt recipe: crop, flip, RandAugment, normalise, erase each sample, then mix the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from contextual_cnn.data.randaugment import ColorJitter, ImageOps, RandAugment
from contextual_cnn.data.sampler import MicroBatch
from contextual_cnn.randomness import Purpose, uniform_rows
from contextual_cnn.settings.augment import AugmentSettings, parse_randaugment

ATTEMPTS = 10  # torchvision's and timm's number of tries at a random crop before the fallback
_COLUMNS = 2 * ATTEMPTS + 4  # area and aspect of each attempt, row, column, flip, and one to a multiple of four


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


class Augmentation:
    """Draws for one image after the other what is done to it.

    Attributes:
        policy: what draws the operations on an image's levels and geometry, if any.
    """

    def __init__(self, settings: AugmentSettings, seed: int) -> None:
        self.settings, self._seed = settings, seed
        self.policy: RandAugment | ColorJitter | None = None
        if settings.randaugment is not None:
            self.policy = RandAugment(parse_randaugment(settings.randaugment))
        elif settings.color_jitter:
            self.policy = ColorJitter(settings.color_jitter)

    def draw(self, batch: MicroBatch) -> Draws:
        """The draws of a micro-batch's images; another cut into micro-batches draws the same for each image."""
        seed, epoch, start, images = self._seed, batch.epoch, batch.start, len(batch.indices)
        u = uniform_rows(Purpose.IMAGE, seed, epoch, start=start, rows=images, columns=_COLUMNS)
        low, high = self.settings.scale
        side = np.sqrt(low + (high - low) * u[:, :ATTEMPTS])
        low, high = (math.log(bound) for bound in self.settings.ratio)
        stretch = np.exp((low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS]) / 2)  # square root of the aspect ratio
        return Draws(
            height=(side / stretch).astype(np.float32),
            width=(side * stretch).astype(np.float32),
            place=u[:, 2 * ATTEMPTS : 2 * ATTEMPTS + 2].astype(np.float32),
            flip=(u[:, 2 * ATTEMPTS + 2] < self.settings.hflip).astype(np.int32),
            ops=self.policy.draw(seed, epoch, start, images) if self.policy is not None else None,
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

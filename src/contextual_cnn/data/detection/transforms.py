"""What is drawn for a training image, and what is done to its pixels, boxes and masks (torchvision.transforms.v2).

Shapes: n objects of an image. Boxes are (left, top, right, bottom) in pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import SanitizeBoundingBoxes
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask

from contextual_cnn.settings.scale_augment import ScaleAugmentSettings

COLUMNS = 8  # numbers that are drawn for an image
_SMALLEST = 1.0  # pixels: what a crop leaves less of is gone


class Scene(NamedTuple):
    """image: (3, H, W) uint8. boxes: (n, 4) float32. labels: (n,) int64. masks: (n, H, W) uint8."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.image.shape[-2:]
        return height, width


def augmented(scene: Scene, settings: ScaleAugmentSettings, uniform: np.ndarray) -> Scene:
    """Resized, perhaps cropped and mirrored, by COLUMNS numbers in [0, 1); objects that a crop cuts away are gone."""
    flip, crop, side, crop_side, high, wide, down, right = uniform.tolist()
    if settings.jitter is not None:
        low, most = settings.jitter
        limit = round(settings.jitter_size * (low + side * (most - low)))
        scene = resized(scene, limit, limit)
        scene = cropped(scene, (settings.jitter_size, settings.jitter_size), down, right)
    else:
        if crop < settings.crop:
            scene = resized(scene, _one_of(settings.crop_short_sides, crop_side), settings.longest)
            height, width = scene.size
            least, most_pixels = settings.crop_sides
            sides = (
                _between(min(height, least), min(height, most_pixels), high),
                _between(min(width, least), min(width, most_pixels), wide),
            )
            scene = cropped(scene, sides, down, right)
        scene = resized(scene, _one_of(settings.short_sides, side), settings.longest)
    return mirrored(scene) if flip < settings.hflip else scene


def fitted(height: int, width: int, short_side: int, longest: int) -> tuple[int, int]:
    """The size of an image whose shorter side is to be so long, and its longer one at most so long."""
    scale = min(short_side / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resized(scene: Scene, short_side: int, longest: int) -> Scene:
    """See `fitted`."""
    size = list(fitted(*scene.size, short_side, longest))
    image, boxes, masks = _wrapped(scene)
    return Scene(
        F.resize(image, size, antialias=True).as_subclass(Tensor),
        F.resize(boxes, size).as_subclass(Tensor),
        scene.labels,
        F.resize(masks, size).as_subclass(Tensor) if len(masks) else scene.masks.new_zeros(0, *size),
    )


def cropped(scene: Scene, sides: tuple[int, int], down: float, right: float) -> Scene:
    """A part of at most this height and width, at these shares of the room that there is for it."""
    height, width = (min(side, have) for side, have in zip(sides, scene.size, strict=True))
    top = _between(0, scene.size[0] - height, down)
    left = _between(0, scene.size[1] - width, right)
    image, boxes, masks = _wrapped(scene)
    boxes, masks = F.crop(boxes, top, left, height, width), F.crop(masks, top, left, height, width)
    whole = {"boxes": F.clamp_bounding_boxes(boxes), "labels": scene.labels, "masks": masks}
    kept = SanitizeBoundingBoxes(min_size=_SMALLEST)(whole)
    return Scene(
        F.crop(image, top, left, height, width).as_subclass(Tensor),
        kept["boxes"].as_subclass(Tensor),
        kept["labels"],
        kept["masks"].as_subclass(Tensor),
    )


def mirrored(scene: Scene) -> Scene:
    """Left and right exchanged."""
    image, boxes, masks = map(F.horizontal_flip, _wrapped(scene))
    return Scene(image.as_subclass(Tensor), boxes.as_subclass(Tensor), scene.labels, masks.as_subclass(Tensor))


def _wrapped(scene: Scene) -> tuple[Image, BoundingBoxes, Mask]:
    boxes = BoundingBoxes(scene.boxes, format=BoundingBoxFormat.XYXY, canvas_size=scene.size)
    return Image(scene.image), boxes, Mask(scene.masks)


def _one_of(choices: Sequence[int], uniform: float) -> int:
    return choices[int(uniform * len(choices))]


def _between(first: int, last: int, uniform: float) -> int:
    """A whole number from first to last, both included."""
    return first + int(uniform * (last - first + 1))

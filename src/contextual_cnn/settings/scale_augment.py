"""The keys of conf/augment/ of instance segmentation: at what size, and which part of it, a training image is shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from contextual_cnn.errors import UserError

_LARGEST_SIDE = 8192


@dataclass(frozen=True, kw_only=True)
class ScaleAugmentSettings:
    """DETR's two branches, as Swin and ConvNeXt have them, or large-scale jitter.

    hflip: the share of the images that are mirrored.
    short_sides, longest: the shorter side becomes one of these, in pixels; the longer one is at most `longest`.
    crop: the share of the images that are cropped first: resized to one of crop_short_sides, then cut to a part whose
        sides are from crop_sides[0] to crop_sides[1] pixels long.
    jitter: large-scale jitter instead of all that: the image is fitted into a square of jitter_size times a factor from
        jitter[0] to jitter[1], then cut to jitter_size.
    """

    hflip: float = 0.5
    short_sides: Sequence[int] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    longest: int = 1333
    crop: float = 0.5
    crop_short_sides: Sequence[int] = (400, 500, 600)
    crop_sides: Sequence[int] = (384, 600)
    jitter: Sequence[float] | None = None
    jitter_size: int = 1024

    def __post_init__(self) -> None:
        for key in ("hflip", "crop"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"augment.{key} is a share from 0 to 1, got {getattr(self, key)}", f"augment.{key}=0.5")
        sides = {
            "short_sides": self.short_sides,
            "crop_short_sides": self.crop_short_sides,
            "crop_sides": self.crop_sides,
            "longest": [self.longest],
            "jitter_size": [self.jitter_size],
        }
        for key, values in sides.items():
            if not values or not all(16 <= value <= _LARGEST_SIDE for value in values):
                raise UserError(
                    f"augment.{key} is of sides from 16 to {_LARGEST_SIDE} pixels, got {list(values)}",
                    f"augment.{key}=800" if len(values) == 1 else f"augment.{key}=[400,600]",
                )
        if len(self.crop_sides) != 2 or self.crop_sides[0] > self.crop_sides[1]:
            raise UserError(
                f"augment.crop_sides are the shortest and the longest one, got {list(self.crop_sides)}",
                "augment.crop_sides=[384,600]",
            )
        if self.jitter is not None and not (len(self.jitter) == 2 and 0.01 <= self.jitter[0] <= self.jitter[1] <= 10):
            raise UserError(
                f"augment.jitter are two factors from 0.01 to 10, got {list(self.jitter)}", "augment.jitter=[0.1,2.0]"
            )

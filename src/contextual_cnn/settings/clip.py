"""The keys of conf/clip/: which frames of a video the model sees, and which part of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from contextual_cnn.errors import UserError
from contextual_cnn.settings.keys import may_change

_MOST_FRAMES = 512


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """A clip is a few frames of a video; a view is one crop of one clip.

    frames: of a clip (TSM: 8 or 16).
    shift_div: 1 / shift_div of the channels come from the next frame, as many from the one before; None: no shift.
    sampling: "uniform" cuts the video into as many equal parts and takes a frame of each; "dense" takes frames that
        are `stride` apart.
    stride: of "dense" (TSM: 64 // frames).
    clips: of a video in an evaluation.
    crops: of a clip in an evaluation: 1 is the centre, 10 are corners, centre and their mirror images, 3 are squares
        along the longer side at full resolution.
    scales: of a training crop's sides, as shares of the shorter side.
    hflip: the share of the training clips that are mirrored.
    partial_bn: trains the first batch norm alone; all others keep the statistics, scales and shifts that model.weights
        brought (temporal segment networks).
    """

    frames: int = 8
    shift_div: int | None = 8
    sampling: Literal["uniform", "dense"] = "uniform"
    stride: int = 8
    clips: int = may_change(1)
    crops: int = may_change(1)
    scales: Sequence[float] = (1.0, 0.875, 0.75, 0.66)
    hflip: float = 0.5
    partial_bn: bool = False

    def __post_init__(self) -> None:
        for key in ("frames", "stride", "clips"):
            if not 1 <= getattr(self, key) <= _MOST_FRAMES:
                raise UserError(
                    f"clip.{key} must be from 1 to {_MOST_FRAMES}, got {getattr(self, key)}", f"clip.{key}=1"
                )
        if self.shift_div is not None and self.shift_div < 2:
            raise UserError(
                f"clip.shift_div={self.shift_div}: two shares of 1 / shift_div are at most all channels",
                "clip.shift_div=8, or clip.shift_div=null",
            )
        if self.crops not in (1, 3, 10):
            raise UserError(f"clip.crops is 1, 3 or 10, got {self.crops}", "clip.crops=1")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise UserError(
                f"clip.scales are shares above 0 and at most 1, got {list(self.scales)}", "clip.scales=[1.0,0.875]"
            )
        if not 0 <= self.hflip <= 1:
            raise UserError(f"clip.hflip is a share from 0 to 1, got {self.hflip}", "clip.hflip=0.5")

"""The keys of conf/data/: which images, and how the pipeline makes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from contextual_cnn.errors import UserError
from contextual_cnn.settings.keys import may_change

Interpolation = Literal["bicubic", "bilinear"]  # what timm's pretrained_cfg may name

_LARGEST_IMAGE = 8192
_MOST_THREADS = 512  # of a process; the system ends one that starts too many


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """A data set, and what an image of it is before it is augmented.

    root: the folder with train/ and val/, or train.txt and val.txt.
    layout: class folders, a list file, tar shards, or, to evaluate on, class folders without splits ("benchmark");
        "auto" looks which it is. "synthetic" is noise that is nowhere.
    exclude: a file with the names of images to leave out, or None.
    limit: so many images of each split, spread evenly over it, to try something out; None takes all.
    image_size: side of the model's input, in pixels.
    crop_pct: evaluation resizes the shorter side to image_size / crop_pct, then crops the centre.
    interpolation: of the resize, of an evaluation's images and of training crops (paper and timm: bicubic).
    mean, std: of the normalisation, for values in 0..1.
    threads: decoding threads (or workers) per process; None takes the process's share of the cores, at most 8.
    prefetch: batches that the pipeline is ahead.
    eval_batch_size: images per process.
    repeats: how often an epoch shows an image, each time drawn anew; it is as long as ever, with fewer images.
    shuffle_shards: None shuffles an epoch as a whole; N shuffles the shards, then the images of N shards at a
        time, so that a network file system reads N files at a time and not all of them.
    loader: "dali", or "torch" for machines without it: worker processes with PIL, to the same images but for
        resampling. "synthetic" reads nothing and gives noise, for the speed of all the rest.
    randaugment_on: the "loader" augments, or torch the batch on its "device".
    on_bad_image: "skip" names an image that cannot be read or decoded in the log, puts another in its place while
        training and counts it as wrong in an evaluation; "stop" ends the run.
    max_bad_images: different ones that a process may meet from its start on, training and evaluation together.
    """

    root: str = may_change(by_node=True)
    layout: Literal["auto", "folders", "list", "shards", "benchmark", "synthetic"] = may_change("auto")
    exclude: str | None = may_change(None)  # the listing tells whether it changed anything
    limit: int | None = None
    image_size: int = 224
    crop_pct: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    threads: int | None = may_change(None, by_node=True)
    prefetch: int = may_change(2)
    eval_batch_size: int = may_change(128)
    repeats: int = 1
    shuffle_shards: int | None = None
    loader: Literal["dali", "torch", "synthetic"] = "dali"
    randaugment_on: Literal["loader", "device"] = "loader"
    on_bad_image: Literal["skip", "stop"] = may_change("skip")
    max_bad_images: int = may_change(100)

    def __post_init__(self) -> None:
        if not 32 <= self.image_size <= _LARGEST_IMAGE:
            raise UserError(
                f"data.image_size={self.image_size}: the models halve the map five times, of {_LARGEST_IMAGE} at most",
                "data.image_size=224",
            )
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"data.crop_pct is a share between 0 and 1, got {self.crop_pct}", "data.crop_pct=0.875")
        check_pixel_statistics(self.mean, self.std)
        for key in ("repeats", "shuffle_shards", "limit", "threads", "prefetch", "eval_batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"data.{key} must be 1 or more, got {value}", f"data.{key}=1")
        check_loader(self.threads, self.max_bad_images)

    @property
    def is_noise(self) -> bool:
        """Whether there is nothing to see on the images: a figure of merit then says nothing about the model."""
        return "synthetic" in (self.loader, self.layout)

    @property
    def pixels(self) -> dict[str, Any]:
        """What weights of other origin may have been trained with otherwise."""
        return {key: getattr(self, key) for key in ("mean", "std", "crop_pct", "interpolation")}


def check_pixel_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises UserError for what no image can be normalised by."""
    if len(mean) != 3 or not all(map(math.isfinite, mean)):
        raise UserError(f"data.mean is a number for each color, got {list(mean)}", "data.mean=[0.485,0.456,0.406]")
    if len(std) != 3 or not all(0 < value < math.inf for value in std):
        raise UserError(f"data.std is a number above 0 for each color, got {list(std)}", "data.std=[0.229,0.224,0.225]")


def check_loader(threads: int | None, max_bad_images: int) -> None:
    """Raises UserError for numbers that no loader can have."""
    if threads is not None and threads > _MOST_THREADS:
        raise UserError(f"data.threads must be at most {_MOST_THREADS}, got {threads}", "data.threads=null")
    if max_bad_images < 0:
        raise UserError(f"data.max_bad_images is 0 or more, got {max_bad_images}", "data.max_bad_images=100")

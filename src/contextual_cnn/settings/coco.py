"""The keys of conf/data/ of instance segmentation: pictures with COCO's annotations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from contextual_cnn.errors import UserError
from contextual_cnn.settings.data import check_loader, check_pixel_statistics
from contextual_cnn.settings.keys import may_change

_LARGEST_SIDE = 8192


@dataclass(frozen=True, kw_only=True)
class CocoSettings:
    """A data set in COCO's files, and how an evaluation shows its images.

    root: the folder with annotations/instances_train2017.json and train2017/, and the same of val; the year may be
        missing.
    limit: takes this number of images of each split, spread evenly over it; None takes all.
    empty_images: also trains on images in which nothing is annotated (Swin, ConvNeXt: no).
    short_side, longest: in an evaluation, the shorter side of an image in pixels, and the limit of the longer one.
    aspect_group: images that follow one another in groups of this size are all upright, or none is: a batch needs less
        padding. 1 does not group.
    mean, std: of the normalisation, for values in 0..1.
    threads: worker processes per process; None takes the process's share of the cores, at most 8.
    prefetch: batches that each worker is ahead.
    eval_batch_size: images per process. Padding to the largest image of a batch reaches the contexts: 1 has none.
    on_bad_image: "skip" names an image that cannot be decoded, or has a malformed annotation, in the log, puts another
        in its place while training and finds nothing in it in an evaluation; "stop" ends the run.
    max_bad_images: different ones that a process may meet from its start on.
    """

    root: str = may_change(by_node=True)
    limit: int | None = None
    empty_images: bool = False
    short_side: int = 800
    longest: int = 1333
    aspect_group: int = 2
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    threads: int | None = may_change(None, by_node=True)
    prefetch: int = may_change(2)
    eval_batch_size: int = may_change(1)
    on_bad_image: Literal["skip", "stop"] = may_change("skip")
    max_bad_images: int = may_change(100)

    def __post_init__(self) -> None:
        for key in ("limit", "threads", "prefetch", "eval_batch_size", "aspect_group"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"data.{key} must be 1 or more, got {value}", f"data.{key}=1")
        if not 32 <= self.short_side <= self.longest <= _LARGEST_SIDE:
            raise UserError(
                f"data.short_side={self.short_side} and data.longest={self.longest}: sides are from 32 to "
                f"{_LARGEST_SIDE} pixels, the longer one is the larger",
                "data.short_side=800 data.longest=1333",
            )
        check_pixel_statistics(self.mean, self.std)
        check_loader(self.threads, self.max_bad_images)

    @property
    def views(self) -> dict[str, Any]:
        """What makes other images of the same files."""
        return {key: getattr(self, key) for key in ("limit", "short_side", "longest", "mean", "std")}

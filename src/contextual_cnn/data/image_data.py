"""The data of a run, as the config names it: a folder, how its images are made, and the two kinds of batches."""

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np

from contextual_cnn.contracts import Batch
from contextual_cnn.data.augmentation import Augmentation
from contextual_cnn.data.bad_images import BadImages
from contextual_cnn.data.resize import Interpolation
from contextual_cnn.data.sampler import BatchPlan, ShardWindows, TrainSampler
from contextual_cnn.data.sources import ImageSource, Layout, find_layout, open_source, read_exclude_list
from contextual_cnn.data.sources.folder_listing import describe_not_read
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.text import printable

if TYPE_CHECKING:
    from contextual_cnn.data.dali import EvaluationBatches

log = logging.getLogger(__name__)

# What the absence of a key means in the config of a run that was started before there was the key
LATER_KEYS = {"interpolation": "bicubic"}
_SPLITS = ("train", "val")
_LARGEST_IMAGE = 8192
_MOST_THREADS = 512  # of a process; the system ends one that starts too many


class ImageData:
    """A data set, checked when it is opened.

    Args:
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

    Attributes:
        pixels: mean, std, crop_pct and interpolation, in which weights of other origin may have been trained otherwise.

    Raises:
        UserError: what is not there, or not as it should be.
    """

    def __init__(
        self,
        splits: Sequence[str] = _SPLITS,
        classes: tuple[str, ...] | None = None,
        *,
        root: str,
        layout: Literal["auto", "folders", "list", "shards", "benchmark", "synthetic"] = "auto",
        exclude: str | None = None,
        limit: int | None = None,
        image_size: int = 224,
        crop_pct: float = 0.875,
        interpolation: Interpolation = "bicubic",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        threads: int | None = None,
        prefetch: int = 2,
        eval_batch_size: int = 128,
        repeats: int = 1,
        shuffle_shards: int | None = None,
        loader: Literal["dali", "torch", "synthetic"] = "dali",
        randaugment_on: Literal["loader", "device"] = "loader",
        on_bad_image: Literal["skip", "stop"] = "skip",
        max_bad_images: int = 100,
    ) -> None:
        if not 32 <= image_size <= _LARGEST_IMAGE:
            raise UserError(
                f"data.image_size={image_size}: the models halve the map five times, of {_LARGEST_IMAGE} at most",
                "data.image_size=224",
            )
        if not 0 < crop_pct <= 1:
            raise UserError(f"data.crop_pct is a share between 0 and 1, got {crop_pct}", "data.crop_pct=0.875")
        if len(mean) != 3 or not all(map(math.isfinite, mean)):
            raise UserError(f"data.mean is a number for each color, got {list(mean)}", "data.mean=[0.485,0.456,0.406]")
        if len(std) != 3 or not all(0 < value < math.inf for value in std):
            raise UserError(
                f"data.std is a number above 0 for each color, got {list(std)}", "data.std=[0.229,0.224,0.225]"
            )
        at_least_one = dict(repeats=repeats, shuffle_shards=shuffle_shards, limit=limit, threads=threads)
        for key, value in (at_least_one | dict(prefetch=prefetch, eval_batch_size=eval_batch_size)).items():
            if value is not None and value < 1:
                raise UserError(f"data.{key} must be 1 or more, got {value}", f"data.{key}=1")
        if threads is not None and threads > _MOST_THREADS:
            raise UserError(f"data.threads must be at most {_MOST_THREADS}, got {threads}", "data.threads=null")
        if max_bad_images < 0:
            raise UserError(f"data.max_bad_images is 0 or more, got {max_bad_images}", "data.max_bad_images=100")
        self.root = Path(root).expanduser().absolute()
        self.layout: Layout = find_layout(self.root, splits[0]) if layout == "auto" else layout
        if shuffle_shards is not None and "train" in splits and self.layout != "shards":
            raise UserError(f"data.shuffle_shards: {root} has no tar shards", "data.shuffle_shards=null")
        self._excluded = read_exclude_list(Path(exclude).expanduser()) if exclude is not None else frozenset()
        self._left_out: set[str] = set()
        self.sources: dict[str, ImageSource] = {}
        for split in splits:
            source = open_source(self.root, split, self.layout, classes)
            classes = source.classes
            source = self._without_excluded(source, split)
            if limit is not None and limit < len(source):
                source = source.take(np.linspace(0, len(source), limit, endpoint=False, dtype=np.int64))
            self.sources[split] = source
        assert classes is not None  # those of the last split
        self.classes = classes
        self.repeats, self.shuffle_shards = repeats, shuffle_shards
        self.image_size, self.crop_pct, self.eval_batch_size = image_size, crop_pct, eval_batch_size
        self._image = dict(image_size=image_size, interpolation=interpolation, mean=mean, std=std)
        self.pixels = dict(mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation)
        self._threads, self._prefetch, self._randaugment_on = threads, prefetch, randaugment_on
        self.loader = loader
        self.bad_images = BadImages(on_bad_image, max_bad_images)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def is_noise(self) -> bool:
        """Whether there is nothing to see on the images: a figure of merit then says nothing about the model."""
        return "synthetic" in (self.loader, self.layout)

    def log_summary(self) -> None:
        """Says what was found, once logging has started."""
        kind = {
            "folders": "class folders",
            "list": "list files",
            "shards": "tar shards",
            "benchmark": "class folders without splits",
            "synthetic": "noise",
        }[self.layout]
        counts = ", ".join(f"{split} {len(source)} images" for split, source in self.sources.items())
        not_read = sum((source.not_read for source in self.sources.values()), Counter())
        others = f"; not read: {describe_not_read(not_read)}" if not_read else ""
        left_out, root = len(self._left_out), printable(str(self.root))
        log.info("%s: %s, %d classes, %s, %d left out%s", root, kind, self.num_classes, counts, left_out, others)
        # names of a split that is not open now are no mistake
        closed = tuple(f"{split}/" for split in _SPLITS if split not in self.sources)
        unknown = sorted(name for name in self._excluded - self._left_out if not name.startswith(closed))
        if unknown:
            log.warning("data.exclude lists %d names that are not there, such as %s", len(unknown), unknown[0])

        if self.is_noise:
            key = "loader" if self.loader == "synthetic" else "layout"
            log.warning("noise instead of images: data.%s=synthetic", key)

    def train_batches(
        self, plan: BatchPlan, augmentation: Augmentation, seed: int, world: World, first_step: int
    ) -> Iterator[Batch]:
        """This rank's endless micro-batches from a step on."""
        source = self.sources["train"]
        shards = None
        if self.shuffle_shards:
            assert source.shard_sizes is not None  # checked when the source was opened
            shards = ShardWindows(source.shard_sizes, self.shuffle_shards)
        sampler = TrainSampler(plan, seed, world.rank, first_step, repeats=self.repeats, shards=shards)
        return self._loader_module().train_batches(
            source,
            sampler,
            augmentation,
            self.bad_images,
            randaugment_on=self._randaugment_on,
            **self._image,
            **self._running_on(world),
        )

    def evaluation_batches(self, world: World) -> "EvaluationBatches":
        """This rank's share of the val split, as often as it is iterated."""
        return self._loader_module().EvaluationBatches(
            self.sources["val"],
            self.bad_images,
            rank=world.rank,
            world_size=world.size,
            batch_size=self.eval_batch_size,
            crop_pct=self.crop_pct,
            **self._image,
            **self._running_on(world),
        )

    def _without_excluded(self, source: ImageSource, split: str) -> ImageSource:
        if not self._excluded:
            return source
        names = [source.name(index) for index in range(len(source))]
        kept = [index for index, name in enumerate(names) if name not in self._excluded]
        self._left_out |= self._excluded.intersection(names)
        if not kept:
            raise UserError(f"data.exclude leaves no image in {split}", "data.exclude=null")
        return source.take(kept)

    def _loader_module(self) -> ModuleType:
        """dali.py or one that takes its place; after the checks, as importing DALI takes seconds."""
        if self.loader == "synthetic":
            from contextual_cnn.data import synthetic_loader

            return synthetic_loader
        if self.loader == "torch":
            from contextual_cnn.data import torch_loader

            return torch_loader
        from contextual_cnn.data import dali

        return dali

    def _running_on(self, world: World) -> dict:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = max(1, min(8, len(os.sched_getaffinity(0)) // local_processes))
        return dict(threads=self._threads or share, prefetch=self._prefetch, device=world.device)

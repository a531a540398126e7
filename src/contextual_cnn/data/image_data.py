"""The data of a run, as the config names it: a folder, how its images are made, and the two kinds of batches."""

import importlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.augmentation import Augmentation
from contextual_cnn.data.bad_images import BadImages
from contextual_cnn.data.sampler import ShardWindows, TrainSampler
from contextual_cnn.data.sources import ImageSource, Layout, find_layout, open_source, read_exclude_list
from contextual_cnn.data.sources.folder_listing import IMAGE_FILES, FileKind, describe_not_read
from contextual_cnn.data.sources.node_listing import once_a_node
from contextual_cnn.data.sources.shared_arrays import give_memory_back
from contextual_cnn.errors import UserError
from contextual_cnn.launcher import cores
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.text import printable

if TYPE_CHECKING:  # they bring torch and DALI, which take seconds; the data are checked before
    from contextual_cnn.contracts import Batch
    from contextual_cnn.data.dali import EvaluationBatches
    from contextual_cnn.distributed import World

log = logging.getLogger(__name__)

SPLITS = ("train", "val")


class ImageData:
    """A data set, checked when it is opened.

    Attributes:
        files: the kind of files that it is made of.

    Args:
        splits: those that are opened.
        classes: the model's, by name, where the data must have the same; None takes the data's own.

    Raises:
        UserError: what is not there, or not as it should be.
    """

    files: FileKind = IMAGE_FILES

    def __init__(
        self, settings: DataSettings, splits: Sequence[str] = SPLITS, classes: tuple[str, ...] | None = None
    ) -> None:
        self.settings = settings
        self.root = Path(settings.root).expanduser().absolute()
        self.layout: Layout = find_layout(self.root, splits[0]) if settings.layout == "auto" else settings.layout
        if settings.shuffle_shards is not None and "train" in splits and self.layout != "shards":
            raise UserError(f"data.shuffle_shards: {settings.root} has no tar shards", "data.shuffle_shards=null")
        exclude = settings.exclude
        self._excluded = read_exclude_list(Path(exclude).expanduser()) if exclude is not None else frozenset()
        of = repr((str(self.root), self.layout, settings.exclude, settings.limit, classes))
        self.sources, self._left_out = once_a_node("_".join(splits), of, partial(self._open, splits, classes))
        self.classes: tuple[str, ...] = self.sources[splits[-1]].classes
        self.bad_images = BadImages(settings.on_bad_image, settings.max_bad_images, self.files.noun)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def log_summary(self) -> None:
        """Says what was found, once logging has started."""
        kind = {
            "folders": "class folders",
            "list": "list files",
            "shards": "tar shards",
            "benchmark": "class folders without splits",
            "synthetic": "noise",
        }[self.layout]
        counts = ", ".join(f"{split} {len(source)} {self.files.noun}s" for split, source in self.sources.items())
        not_read = sum((source.not_read for source in self.sources.values()), Counter[str]())
        others = f"; not read: {describe_not_read(not_read)}" if not_read else ""
        left_out, root = len(self._left_out), printable(str(self.root))
        log.info("%s: %s, %d classes, %s, %d left out%s", root, kind, self.num_classes, counts, left_out, others)
        # names of a split that is not open now are no mistake
        closed = tuple(f"{split}/" for split in SPLITS if split not in self.sources)
        unknown = sorted(name for name in self._excluded - self._left_out if not name.startswith(closed))
        if unknown:
            log.warning("data.exclude lists %d names that are not there, such as %s", len(unknown), unknown[0])

        if self.settings.is_noise:
            key = "loader" if self.settings.loader == "synthetic" else "layout"
            log.warning("noise instead of images: data.%s=synthetic", key)

    def train_batches(
        self, plan: BatchPlan, augment: AugmentSettings, seed: int, world: "World", first_step: int
    ) -> "Iterator[Batch]":
        """This rank's endless micro-batches from a step on."""
        source, settings = self.sources["train"], self._settings_in_use()
        sampler, augmentation = self._sampler(plan, seed, world, first_step), Augmentation(augment, seed)
        return self._loader().train_batches(source, sampler, augmentation, self.bad_images, settings, world.device)

    def evaluation_batches(self, world: "World") -> "EvaluationBatches":
        """This rank's share of the val split, as often as it is iterated."""
        return self._loader().EvaluationBatches(self.sources["val"], self.bad_images, self._settings_in_use(), world)

    def _open(
        self, splits: Sequence[str], classes: tuple[str, ...] | None
    ) -> tuple[dict[str, ImageSource], frozenset[str]]:
        """The sources, in memory that other processes can map; and the names that are left out of them."""
        sources, left_out, limit = {}, set[str](), self.settings.limit
        for split in splits:
            source = self._open_split(split, classes)
            classes = source.classes
            if self._excluded:
                names = [source.name(index) for index in range(len(source))]
                kept = [index for index, name in enumerate(names) if name not in self._excluded]
                left_out |= self._excluded.intersection(names)
                if not kept:
                    raise UserError(f"data.exclude leaves no image in {split}", "data.exclude=null")
                source = source.take(kept)
            if limit is not None and limit < len(source):
                source = source.take(np.linspace(0, len(source), limit, endpoint=False, dtype=np.int64))
            with suppress(OSError):  # without room for it each process has its own
                source = source.shared()
            sources[split] = source
        give_memory_back()
        return sources, frozenset(left_out)

    def _open_split(self, split: str, classes: tuple[str, ...] | None) -> ImageSource:
        return open_source(self.root, split, self.layout, classes)

    def _sampler(self, plan: BatchPlan, seed: int, world: "World", first_step: int) -> TrainSampler:
        source, settings, shards = self.sources["train"], self.settings, None
        if settings.shuffle_shards:
            assert source.shard_sizes is not None  # checked when the source was opened
            shards = ShardWindows(source.shard_sizes, settings.shuffle_shards)
        return TrainSampler(plan, seed, world.rank, first_step, repeats=settings.repeats, shards=shards)

    def _loader(self) -> ModuleType:
        """dali.py or one that takes its place; after the checks, as importing DALI takes seconds."""
        name = {"synthetic": "synthetic_loader", "torch": "torch_loader", "dali": "dali"}[self.settings.loader]
        return importlib.import_module(f"contextual_cnn.data.{name}")

    def _settings_in_use(self) -> DataSettings:
        """With the number of threads."""
        return replace(self.settings, threads=self.settings.threads or min(8, cores()))

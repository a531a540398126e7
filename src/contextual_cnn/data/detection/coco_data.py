"""The scenes of a run, as the config names them: a folder, and the two kinds of batches."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.bad_images import BadImages
from contextual_cnn.data.detection.annotations import CocoImages, open_coco
from contextual_cnn.data.detection.masks import import_mask
from contextual_cnn.data.image_data import SPLITS
from contextual_cnn.data.sampler import AlikeGroups, TrainSampler
from contextual_cnn.data.sources.node_listing import once_a_node
from contextual_cnn.data.sources.shared_arrays import give_memory_back
from contextual_cnn.errors import UserError
from contextual_cnn.launcher import cores
from contextual_cnn.settings.coco import CocoSettings
from contextual_cnn.settings.scale_augment import ScaleAugmentSettings
from contextual_cnn.text import printable

if TYPE_CHECKING:  # they bring torch, which takes seconds
    from contextual_cnn.data.detection.coco_loader import EvaluationBatches, Scenes
    from contextual_cnn.distributed import World

log = logging.getLogger(__name__)


class CocoData:
    """A data set in COCO's files, checked when it is opened.

    Args:
        splits: those that are opened.
        classes: the model's, by name, where the data must have the same; None takes the data's own.

    Raises:
        UserError: what is not there, or not as it should be.
    """

    def __init__(
        self, settings: CocoSettings, splits: Sequence[str] = SPLITS, classes: tuple[str, ...] | None = None
    ) -> None:
        import_mask()  # the workers would find out later
        self.settings = settings
        self.root = Path(settings.root).expanduser().absolute()
        of = repr((str(self.root), settings.limit, settings.empty_images, classes))
        self.sources: dict[str, CocoImages] = once_a_node("_".join(splits), of, partial(self._open, splits, classes))
        self.classes: tuple[str, ...] = self.sources[splits[-1]].classes
        self.bad_images = BadImages(settings.on_bad_image, settings.max_bad_images)

    def log_summary(self) -> None:
        """Says what was found, once logging has started."""
        counts = ", ".join(
            f"{split} {len(source)} images with {source.counts()[0].sum()} objects"
            for split, source in self.sources.items()
        )
        log.info("%s: COCO files, %d classes, %s", printable(str(self.root)), len(self.classes), counts)

    def train_batches(
        self, plan: BatchPlan, augment: ScaleAugmentSettings, seed: int, world: "World", first_step: int
    ) -> "Iterator[Scenes]":
        """This rank's endless micro-batches from a step on."""
        from contextual_cnn.data.detection import coco_loader

        source, settings = self.sources["train"], self._settings_in_use()
        alike = AlikeGroups(source.is_upright(), settings.aspect_group) if settings.aspect_group > 1 else None
        sampler = TrainSampler(plan, seed, world.rank, first_step, alike=alike)
        return coco_loader.train_batches(source, sampler, augment, self.bad_images, settings, world.device)

    def evaluation_batches(self, world: "World") -> "EvaluationBatches":
        """This rank's share of the val split, as often as it is iterated."""
        from contextual_cnn.data.detection import coco_loader

        return coco_loader.EvaluationBatches(self.sources["val"], self.bad_images, self._settings_in_use(), world)

    def _open(self, splits: Sequence[str], classes: tuple[str, ...] | None) -> dict[str, CocoImages]:
        sources: dict[str, CocoImages] = {}
        for split in splits:
            source = open_coco(self.root, split, classes)
            classes = source.classes
            everything, usable = source.counts()
            if split == "train" and not self.settings.empty_images:
                source = source.take(np.flatnonzero(usable))
            if not everything.sum() or not len(source):
                raise UserError(
                    f"data.root: {self.root} has no objects in {split}", "annotate some, or data.root=ROOT of others"
                )
            limit = self.settings.limit
            if limit is not None and limit < len(source):
                source = source.take(np.linspace(0, len(source), limit, endpoint=False, dtype=np.int64))
            with suppress(OSError):  # without room for it each process has its own
                source = source.shared()
            sources[split] = source
        give_memory_back()
        return sources

    def _settings_in_use(self) -> CocoSettings:
        """With the number of workers."""
        return replace(self.settings, threads=self.settings.threads or min(8, cores()))

"""The data of a run, as the config names it: a folder, how its images are made, and the two kinds of batches."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from contextual_cnn.contracts import Batch
from contextual_cnn.data.augmentation import Augmentation
from contextual_cnn.data.image_folder import open_image_folder
from contextual_cnn.data.sampler import BatchPlan, TrainSampler
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError

if TYPE_CHECKING:
    from contextual_cnn.data.dali import EvaluationBatches


class ImageData:
    """A data set in ImageNet's layout, checked when it is opened.

    Args:
        root: the folder with train/ and val/.
        image_size: side of the model's input, in pixels.
        crop_pct: evaluation resizes the shorter side to image_size / crop_pct, then crops the centre.
        mean, std: of the normalisation, for values in 0..1.
        threads: decoding threads per process; None takes the process's share of the cores, at most 8.
        prefetch: batches that the pipeline is ahead.
        eval_batch_size: images per process.
        randaugment_by: "dali" augments in the pipeline, "torch" the batch on its device, to the same images.

    Raises:
        UserError: a folder that is not there or not laid out as it should be.
    """

    def __init__(
        self,
        splits: Sequence[str] = ("train", "val"),
        classes: tuple[str, ...] | None = None,
        *,
        root: str,
        image_size: int = 224,
        crop_pct: float = 0.875,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        threads: int | None = None,
        prefetch: int = 2,
        eval_batch_size: int = 128,
        randaugment_by: Literal["dali", "torch"] = "dali",
    ) -> None:
        if image_size < 32:
            raise UserError(
                f"data.image_size={image_size}: the models halve the map five times",
                "data.image_size=32 or more",
            )
        if not 0 < crop_pct <= 1:
            raise UserError(f"data.crop_pct is a share between 0 and 1, got {crop_pct}", "data.crop_pct=0.875")
        self.folders = {}
        for split in splits:
            self.folders[split] = open_image_folder(Path(root).expanduser().absolute(), split, classes)
            classes = self.folders[split].classes
        self.classes = classes
        self.image_size, self.crop_pct, self.eval_batch_size = image_size, crop_pct, eval_batch_size
        self._image = dict(image_size=image_size, mean=mean, std=std)
        self._threads, self._prefetch, self._randaugment_by = threads, prefetch, randaugment_by

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def train_batches(
        self, plan: BatchPlan, augmentation: Augmentation, seed: int, world: World, first_step: int
    ) -> Iterator[Batch]:
        """This rank's endless micro-batches from a step on."""
        from contextual_cnn.data.dali import train_batches  # after the checks: importing DALI takes seconds

        sampler = TrainSampler(plan, seed, world.rank, first_step)
        return train_batches(
            self.folders["train"],
            sampler,
            augmentation,
            randaugment_by=self._randaugment_by,
            **self._image,
            **self._running_on(world),
        )

    def evaluation_batches(self, world: World) -> "EvaluationBatches":
        """This rank's share of the val split, as often as it is iterated."""
        from contextual_cnn.data.dali import EvaluationBatches

        return EvaluationBatches(
            self.folders["val"],
            rank=world.rank,
            world_size=world.size,
            batch_size=self.eval_batch_size,
            crop_pct=self.crop_pct,
            **self._image,
            **self._running_on(world),
        )

    def _running_on(self, world: World) -> dict:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = max(1, min(8, len(os.sched_getaffinity(0)) // local_processes))
        return dict(threads=self._threads or share, prefetch=self._prefetch, device=world.device)

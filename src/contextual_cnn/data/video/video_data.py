"""The videos of a run, as the config names them: a folder, and the two kinds of batches of clips."""

import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.image_data import SPLITS, ImageData
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.data.sources.class_folders import open_class_folders
from contextual_cnn.data.sources.file_list import open_file_list
from contextual_cnn.data.sources.folder_listing import VIDEO_FILES
from contextual_cnn.errors import UserError
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.data import DataSettings

if TYPE_CHECKING:  # they bring torch, which takes seconds
    from contextual_cnn.contracts import Batch
    from contextual_cnn.data.video.video_loader import EvaluationBatches
    from contextual_cnn.distributed import World

_OPEN = {"folders": open_class_folders, "list": open_file_list}


class VideoData(ImageData):
    """A data set of videos, checked when it is opened: class folders, or lists. The rest is as for images.

    Raises:
        UserError: what is not there, or not as it should be; keys that mean nothing for videos.
    """

    files = VIDEO_FILES

    def __init__(
        self,
        settings: DataSettings,
        clip: ClipSettings,
        splits: Sequence[str] = SPLITS,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.clip = clip
        _check(settings)
        super().__init__(settings, splits, classes)

    def train_batches(  # type: ignore[override] # what is drawn for a clip is a part of `clip`
        self, plan: BatchPlan, seed: int, world: "World", first_step: int
    ) -> "Iterator[Batch]":
        """This rank's endless micro-batches from a step on."""
        sampler = self._sampler(plan, seed, world, first_step)
        source, settings = self.sources["train"], self._settings_in_use()
        return self._loader().train_batches(source, sampler, self.clip, self.bad_images, settings, world.device)

    def evaluation_batches(self, world: "World") -> "EvaluationBatches":  # type: ignore[override]
        """This rank's share of the val split, as often as it is iterated."""
        source, settings = self.sources["val"], self._settings_in_use()
        return self._loader().EvaluationBatches(source, self.clip, self.bad_images, settings, world)

    def _open_split(self, split: str, classes: tuple[str, ...] | None) -> ImageSource:
        if self.layout not in _OPEN:
            raise UserError(
                f"data.root: {self.root} has videos neither in class folders nor in lists, but {self.layout}",
                "ROOT/train/CLASS/VIDEO.mp4, or ROOT/train.txt",
            )
        return _OPEN[self.layout](self.root, split, classes, VIDEO_FILES)

    def _loader(self) -> ModuleType:
        return importlib.import_module("contextual_cnn.data.video.video_loader")


def _check(settings: DataSettings) -> None:
    """Keys of the data group that are about images alone."""
    if settings.loader != "torch":
        raise UserError(f"data.loader={settings.loader}: videos are decoded by worker processes", "data.loader=torch")
    if settings.randaugment_on != "loader":
        raise UserError("data.randaugment_on=device: clips have no RandAugment", "data.randaugment_on=loader")
    if settings.shuffle_shards is not None:
        raise UserError("data.shuffle_shards: videos do not come in tar shards", "data.shuffle_shards=null")

"""The two kinds of batches of clips: PyAV in worker processes.

Shapes: B videos, V views of a video, T frames of a view, S side of the model's input.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from contextual_cnn.contracts import Batch
from contextual_cnn.data.bad_images import COUNTS_AS_WRONG, BadImage, BadImages, first_usable
from contextual_cnn.data.image_check import reason_of
from contextual_cnn.data.on_device import normalise
from contextual_cnn.data.reader import read_patiently
from contextual_cnn.data.sampler import MicroBatch, TrainSampler, evaluation_batches
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.data.video.crops import cropped, evaluation_views, training_box
from contextual_cnn.data.video.decode import UnusableVideo, read_frames
from contextual_cnn.data.video.frames import evaluation_frames, training_frames
from contextual_cnn.data.worker_batches import Made, on_device, worker_loader
from contextual_cnn.distributed import World
from contextual_cnn.randomness import Purpose, uniform_rows
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.data import DataSettings

_CROP_AND_FLIP = 4  # numbers of a clip: sides, place, flip, and one to a multiple of four


class Maker(NamedTuple):
    """What a worker makes clips of."""

    videos: ImageSource
    clip: ClipSettings
    settings: DataSettings

    @property
    def views(self) -> tuple[int, ...]:
        """(V, T, S, S, 3) of a video in an evaluation."""
        side = short_side(self.settings) if self.clip.crops == 3 else self.settings.image_size
        return self.clip.clips * self.clip.crops, self.clip.frames, side, side, 3


def short_side(settings: DataSettings) -> int:
    """To which an evaluation resizes."""
    return round(settings.image_size / settings.crop_pct)


def evaluated_views(encoded: bytes, clip: ClipSettings, settings: DataSettings) -> np.ndarray:
    """What an evaluation shows the model of a video.

    Args:
        encoded: a whole file.

    Returns:
        (V, T, S, S, 3) uint8.

    Raises:
        UnusableVideo: see `read_frames`.
    """
    clips = read_frames(encoded, lambda number: evaluation_frames(number, clip))
    sides = settings.image_size, short_side(settings)
    return np.concatenate([evaluation_views(frames, clip, *sides) for frames in clips])


def train_batches(
    videos: ImageSource,
    sampler: TrainSampler,
    clip: ClipSettings,
    bad: BadImages,
    settings: DataSettings,
    device: torch.device,
) -> Iterator[Batch]:
    """Clips (B, 1, T, 3, S, S) float32, normalised, and their classes (B,). The threads are worker processes."""
    make = partial(_make_training_batch, Maker(videos, clip, settings), sampler)
    for pixels, targets, replaced in on_device(worker_loader(make, count(), settings, device), bad, device):
        yield Batch(normalised(pixels, settings), targets, replaced)


class EvaluationBatches:
    """A rank's share of a split, each video once: (B, V, T, 3, S, S) float32 and classes (B,), as often as iterated.

    Attributes:
        images: how many videos the whole split has.
    """

    def __init__(
        self, videos: ImageSource, clip: ClipSettings, bad: BadImages, settings: DataSettings, world: World
    ) -> None:
        self.images = len(videos)
        shares = list(evaluation_batches(len(videos), settings.eval_batch_size, world.rank, world.size))
        make = partial(_make_evaluation_batch, Maker(videos, clip, settings), shares)
        self._settings, self._device, self._bad = settings, world.device, bad
        self._loader = worker_loader(make, range(len(shares)), settings, world.device)

    def __iter__(self) -> Iterator[Batch]:
        """One pass."""
        for pixels, targets, _ in on_device(self._loader, self._bad, self._device):
            yield Batch(normalised(pixels, self._settings), targets)


def normalised(pixels: Tensor, settings: DataSettings) -> Tensor:
    """(B, V, T, 3, S, S) uint8 -> float32, each frame channels_last."""
    return normalise(pixels.flatten(0, 2), settings.mean, settings.std).unflatten(0, pixels.shape[:3])


def draws(sampler: TrainSampler, n: int, clip: ClipSettings) -> np.ndarray:
    """(B, 4 + T or more) numbers in [0, 1) for the clips of a micro-batch, by their places in the epoch."""
    batch: MicroBatch = sampler[n]
    columns = _CROP_AND_FLIP + -(-clip.frames // 4) * 4
    key = (sampler.seed, batch.epoch)
    return uniform_rows(Purpose.CLIP, *key, start=batch.start, rows=len(batch.indices), columns=columns)


def _make_training_batch(maker: Maker, sampler: TrainSampler, n: int) -> Made:
    batch, replaced, size, clip = sampler[n], 0, maker.settings.image_size, maker.clip
    reports: list[BadImage] = []
    pixels = np.empty((len(batch.indices), 1, clip.frames, size, size, 3), np.uint8)
    targets = np.empty(len(batch.indices), np.int64)
    for i, (wanted, uniform) in enumerate(zip(batch.indices, draws(sampler, n, clip), strict=True)):
        use = partial(_training_clip, maker, uniform)
        index, pixels[i, 0] = first_usable(sampler.candidates(n, i), use, reports.append)
        assert index is not None  # there are substitutes without end
        targets[i] = maker.videos.targets[index]
        replaced += int(index != wanted)
    return Made(torch.from_numpy(pixels), torch.from_numpy(targets), reports, replaced)


def _training_clip(maker: Maker, uniform: np.ndarray, index: int) -> np.ndarray:
    """(T, S, S, 3) uint8. Raises BadImage."""
    clip, size = maker.clip, maker.settings.image_size
    of_frames = uniform[_CROP_AND_FLIP : _CROP_AND_FLIP + clip.frames]
    choose = partial(training_frames, clip=clip, uniform=of_frames)
    frames = _of_file(maker.videos, index, partial(read_frames, choose=choose))
    height, width = frames.shape[1:3]
    box = training_box(height, width, size, clip.scales, uniform[:2])
    return cropped(frames, box, size, flip=uniform[2] < clip.hflip)


def _make_evaluation_batch(maker: Maker, shares: Sequence[np.ndarray], n: int) -> Made:
    reports: list[BadImage] = []
    blank = np.zeros(maker.views, np.uint8)
    taken = [first_usable([int(index)], partial(_views, maker), reports.append, blank) for index in shares[n]]
    targets = [COUNTS_AS_WRONG if index is None else int(maker.videos.targets[index]) for index, _ in taken]
    return Made(torch.from_numpy(np.stack([views for _, views in taken])), torch.tensor(targets), reports)


def _views(maker: Maker, index: int) -> np.ndarray:
    """(V, T, S, S, 3) uint8. Raises BadImage."""
    return _of_file(maker.videos, index, partial(evaluated_views, clip=maker.clip, settings=maker.settings))


def _of_file(videos: ImageSource, index: int, use: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """What a function makes of a whole file. Raises BadImage."""
    try:
        return use(read_patiently(videos, index))
    except UnusableVideo as error:
        raise BadImage(videos.name(index), str(error)) from error
    except OSError as error:
        raise BadImage(videos.name(index), reason_of(error)) from error

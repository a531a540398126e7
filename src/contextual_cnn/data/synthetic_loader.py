"""The two kinds of batches without reading, decoding or augmenting: one batch of noise again and again.

For the speed of the training alone. It has the same two names as dali.py, with the same arguments, of which those that
are about pixels mean nothing.
"""

from collections.abc import Iterator

import torch

from contextual_cnn.contracts import Batch
from contextual_cnn.data.bad_images import BadImages
from contextual_cnn.data.sampler import TrainSampler, evaluation_batches
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.data.transfer import to_device
from contextual_cnn.distributed import World
from contextual_cnn.randomness import Purpose, generator
from contextual_cnn.settings.data import DataSettings


def train_batches(
    images: ImageSource,
    sampler: TrainSampler,
    augmentation: object,
    bad: BadImages,
    settings: DataSettings,
    device: torch.device,
) -> Iterator[Batch]:
    """As `dali.train_batches`; the targets are the images' own."""
    noise = _noise(sampler.plan.micro_batch, settings.image_size, device)
    n = 0
    while True:
        targets = to_device(images.targets[sampler[n].indices], device)
        # A batch of its own: what mixes does so in place
        yield Batch(noise.clone(memory_format=torch.channels_last), targets)
        n += 1


class EvaluationBatches:
    """As `dali.EvaluationBatches`."""

    def __init__(self, images: ImageSource, bad: BadImages, settings: DataSettings, world: World) -> None:
        self.images = len(images)
        self._targets, self._device = images.targets, world.device
        self._shares = list(evaluation_batches(len(images), settings.eval_batch_size, world.rank, world.size))
        self._noise = _noise(settings.eval_batch_size, settings.image_size, world.device)

    def __iter__(self) -> Iterator[Batch]:
        for share in self._shares:
            yield Batch(self._noise[: len(share)], to_device(self._targets[share], self._device))


def _noise(images: int, size: int, device: torch.device) -> torch.Tensor:
    noise = generator(Purpose.SYNTHETIC).standard_normal((images, 3, size, size), dtype="float32")
    return to_device(noise, device).contiguous(memory_format=torch.channels_last)

"""The two kinds of batches without DALI: PIL and timm's own operations in worker processes.

The reference that the DALI pipelines are tested against, from the same draws, and the loader of machines that have no
DALI. It has the same two names as dali.py, with the same arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from contextual_cnn.contracts import Batch
from contextual_cnn.data.augmentation import Augmentation, Draws, crop_box
from contextual_cnn.data.bad_images import COUNTS_AS_WRONG, BadImage, BadImages, first_usable
from contextual_cnn.data.image_check import open_image, reason_of
from contextual_cnn.data.on_device import augment, normalise
from contextual_cnn.data.randaugment import pil_ops
from contextual_cnn.data.randaugment.policy import Op, fill_color
from contextual_cnn.data.reader import read_image
from contextual_cnn.data.resize import resize
from contextual_cnn.data.sampler import TrainSampler, evaluation_batches
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.data.worker_batches import Made, on_device, worker_loader
from contextual_cnn.distributed import World
from contextual_cnn.settings.data import DataSettings


def train_batches(
    images: ImageSource,
    sampler: TrainSampler,
    augmentation: Augmentation,
    bad: BadImages,
    settings: DataSettings,
    device: torch.device,
) -> Iterator[Batch]:
    """As `dali.train_batches`. The threads are worker processes."""
    later = augmentation.policy is not None and settings.randaugment_on == "device"  # on the device
    fill = fill_color(settings.mean)
    make = partial(_make_training_batch, images, sampler, augmentation, settings, None if later else fill)
    loader = worker_loader(make, count(), settings, device)
    for n, (pixels, targets, replaced) in enumerate(on_device(loader, bad, device)):
        if later:
            draws, interpolation = augmentation.draw(sampler[n]), augmentation.settings.interpolation
            pixels = augment(pixels, draws, fill=fill, interpolation=interpolation)
        yield Batch(normalise(pixels, settings.mean, settings.std), targets, replaced)


class EvaluationBatches:
    """As `dali.EvaluationBatches`, by timm's own transform."""

    def __init__(self, images: ImageSource, bad: BadImages, settings: DataSettings, world: World) -> None:
        self.images = len(images)
        shares = list(evaluation_batches(len(images), settings.eval_batch_size, world.rank, world.size))
        # For its prefetching loader timm leaves the normalisation to the device; so do we
        transform = create_transform(
            settings.image_size,
            interpolation=settings.interpolation,
            crop_pct=settings.crop_pct,
            use_prefetcher=True,
        )
        make = partial(_make_evaluation_batch, images, shares, transform)
        self._settings, self._device, self._bad = settings, world.device, bad
        self._loader = worker_loader(make, range(len(shares)), settings, world.device)

    def __iter__(self) -> Iterator[Batch]:
        """One pass."""
        for pixels, targets, _ in on_device(self._loader, self._bad, self._device):
            yield Batch(normalise(pixels, self._settings.mean, self._settings.std), targets)


def _make_training_batch(
    images: ImageSource,
    sampler: TrainSampler,
    augmentation: Augmentation,
    settings: DataSettings,
    fill: tuple[int, ...] | None,
    n: int,
) -> Made:
    """Without `fill` the images are neither augmented nor flipped."""
    batch, replaced, size = sampler[n], 0, settings.image_size
    reports: list[BadImage] = []
    draws = augmentation.draw(batch)
    pixels = np.empty((len(batch.indices), size, size, 3), np.uint8)
    targets = np.empty(len(batch.indices), np.int64)
    for i, wanted in enumerate(batch.indices):
        index, image = first_usable(sampler.candidates(n, i), partial(_decode, images), reports.append)
        top, left, height, width = crop_box(draws, i, image.height, image.width, augmentation.settings.ratio)
        crop = np.asarray(image.crop((left, top, left + width, top + height)))
        crop = resize(crop, size, size, settings.interpolation)
        pixels[i] = crop if fill is None else _augment(crop, draws, i, augmentation, fill)
        assert index is not None  # there are substitutes without end
        targets[i] = images.targets[index]
        replaced += int(index != wanted)
    return Made(torch.from_numpy(pixels), torch.from_numpy(targets), reports, replaced)


def _make_evaluation_batch(images: ImageSource, shares: Sequence[np.ndarray], transform: Callable, n: int) -> Made:
    reports: list[BadImage] = []
    blank = Image.new("RGB", (1, 1))
    decode = partial(_decode, images)
    taken = [first_usable([int(index)], decode, reports.append, blank) for index in shares[n]]
    pixels = torch.stack([transform(image).permute(1, 2, 0) for _, image in taken])
    targets = [COUNTS_AS_WRONG if index is None else int(images.targets[index]) for index, _ in taken]
    return Made(pixels, torch.tensor(targets), reports)


def _decode(images: ImageSource, index: int) -> Image.Image:
    """RGB, to its last pixel. Raises BadImage."""
    encoded = read_image(images, index)
    try:
        image = open_image(encoded)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # a decoder raises anything from OSError to struct.error
        raise BadImage(images.name(index), reason_of(error)) from error


def _augment(pixels: np.ndarray, draws: Draws, i: int, augmentation: Augmentation, fill: tuple[int, ...]) -> np.ndarray:
    """RandAugment or color jitter by timm, and the flip."""
    if draws.ops is not None and (draws.ops.op[i] != Op.NONE).any():
        image = pil_ops.apply_ops(
            Image.fromarray(pixels),
            draws.ops.op[i],
            draws.ops.argument[i],
            fill=fill,
            interpolation=augmentation.settings.interpolation,
        )
        pixels = np.asarray(image)
    # torch's flip is ten times as fast as to copy from numpy's view
    return torch.tensor(pixels).flip(1).numpy() if draws.flip[i] else pixels

"""The two kinds of batches without DALI: PIL and timm's own operations in worker processes, from the same draws.

The reference that the DALI pipelines are tested against, and the loader of machines that have no DALI. It has the
same two names as dali.py, with the same arguments. A worker makes whole micro-batches, so nothing is collated.
"""

import gc
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from contextual_cnn.contracts import Batch
from contextual_cnn.data.augmentation import Augmentation, Draws, crop_box, draw
from contextual_cnn.data.bad_images import COUNTS_AS_WRONG, BadImage, BadImages, blank_if_bad, first_usable
from contextual_cnn.data.image_check import describe
from contextual_cnn.data.on_device import augment, normalise
from contextual_cnn.data.randaugment import pil_ops
from contextual_cnn.data.randaugment.policy import fill_color
from contextual_cnn.data.reader import read_image
from contextual_cnn.data.sampler import TrainSampler, evaluation_batches
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.errors import UserError


def train_batches(
    images: ImageSource,
    sampler: TrainSampler,
    augmentation: Augmentation,
    bad: BadImages,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    threads: int,
    prefetch: int,
    randaugment_on: Literal["loader", "device"],
    device: torch.device,
) -> Iterator[Batch]:
    """As `dali.train_batches`. threads: worker processes."""
    on_device = augmentation.policy is not None and randaugment_on == "device"
    fill = fill_color(mean)

    def make(n: int) -> _Made:
        batch, reports, replaced = sampler[n], [], 0
        draws = draw(augmentation, sampler.seed, batch)
        pixels = np.empty((len(batch.indices), image_size, image_size, 3), np.uint8)
        targets = np.empty(len(batch.indices), np.int64)
        for i, wanted in enumerate(batch.indices):
            index, image = first_usable(sampler.candidates(n, i), partial(_decode, images), reports.append)
            image = _crop(image, draws, i, augmentation, image_size)
            pixels[i] = image if on_device else _augment(image, draws, i, augmentation, fill)
            targets[i] = images.targets[index]
            replaced += index != wanted
        return _Made(pixels, targets, reports, replaced)

    loader = _loader(make, count(), threads, prefetch, device)
    for n, (pixels, targets, replaced) in enumerate(_on_device(loader, bad, device)):
        if on_device:
            draws = draw(augmentation, sampler.seed, sampler[n])
            pixels = augment(pixels, draws, fill=fill, interpolation=augmentation.interpolation)
        bad.replaced += replaced
        yield Batch(normalise(pixels, mean, std), targets)


class EvaluationBatches:
    """As `dali.EvaluationBatches`, by timm's own transform."""

    def __init__(
        self,
        images: ImageSource,
        bad: BadImages,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        image_size: int,
        crop_pct: float,
        mean: Sequence[float],
        std: Sequence[float],
        threads: int,
        prefetch: int,
        device: torch.device,
    ) -> None:
        self.images = len(images)
        shares = list(evaluation_batches(len(images), batch_size, rank, world_size))
        # For its prefetching loader timm leaves the normalisation to the device; so do we
        transform = create_transform(image_size, interpolation="bicubic", crop_pct=crop_pct, use_prefetcher=True)

        blank = Image.new("RGB", (1, 1))

        def make(n: int) -> _Made:
            reports = []
            taken = [blank_if_bad(int(index), partial(_decode, images), blank, reports.append) for index in shares[n]]
            pixels = np.stack([transform(image).permute(1, 2, 0).numpy() for _, image in taken])
            targets = [COUNTS_AS_WRONG if index is None else images.targets[index] for index, _ in taken]
            return _Made(pixels, np.array(targets, dtype=np.int64), reports)

        self._mean, self._std, self._device, self._bad = mean, std, device, bad
        self._loader = _loader(make, range(len(shares)), threads, prefetch, device)

    def __iter__(self) -> Iterator[Batch]:
        """One pass."""
        for pixels, targets, _ in _on_device(self._loader, self._bad, self._device):
            yield Batch(normalise(pixels, self._mean, self._std), targets)


class _Made(NamedTuple):
    """What a worker makes: (B, size, size, 3) uint8, (B,) int64, the bad images met, and how many others took their
    places.
    """

    pixels: np.ndarray
    targets: np.ndarray
    reports: list[BadImage]
    replaced: int = 0


class _Making(Dataset):
    """Whatever `make` gives for a number; a UserError is handed over, as one that is raised would not come whole."""

    def __init__(self, make: Callable[[int], _Made]) -> None:
        self._make = make

    def __getitem__(self, n: int) -> tuple | UserError:
        try:
            made = self._make(n)
        except UserError as error:
            return error
        return torch.from_numpy(made.pixels), torch.from_numpy(made.targets), made.reports, made.replaced


def _loader(make: Callable, numbers, workers: int, prefetch: int, device: torch.device) -> DataLoader:
    return DataLoader(
        _Making(make),
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        persistent_workers=True,
        multiprocessing_context="fork",  # what is to be made is a function here, which cannot be sent to a process
        # a worker that collected what the parent had left over, DALI's pipelines say, would wait for threads it has not
        worker_init_fn=lambda _: gc.freeze(),
        pin_memory=device.type == "cuda",
    )


def _on_device(loader: DataLoader, bad: BadImages, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(B, 3, H, W) uint8 channels_last, (B,) int64, and how many images took the places of others."""
    for made in loader:
        if isinstance(made, UserError):
            raise made
        pixels, targets, reports, replaced = made
        for report in reports:
            bad.report(report)
        pixels, targets = (tensor.to(device, non_blocking=True) for tensor in (pixels, targets))
        yield pixels.permute(0, 3, 1, 2), targets, replaced


def _decode(images: ImageSource, index: int) -> Image.Image:
    encoded = read_image(images, index)
    try:
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except Exception as error:  # a decoder raises anything from OSError to struct.error
        raise BadImage(images.name(index), describe(error)) from error


def _crop(image: Image.Image, draws: Draws, i: int, augmentation: Augmentation, size: int) -> Image.Image:
    top, left, height, width = crop_box(draws, i, image.height, image.width, augmentation.ratio)
    return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)


def _augment(image: Image.Image, draws: Draws, i: int, augmentation: Augmentation, fill: tuple[int, ...]):
    if draws.ops is not None:
        options = dict(fill=fill, interpolation=augmentation.interpolation)
        image = pil_ops.apply_ops(image, draws.ops.op[i], draws.ops.argument[i], **options)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.flip[i] else image

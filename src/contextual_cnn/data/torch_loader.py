"""The two kinds of batches without DALI: torchvision, PIL and timm's own operations in worker processes.

The reference that the DALI pipelines are tested against, from the same draws, and the loader of machines that have no
DALI. It has the same two names as dali.py, with the same arguments. A worker makes whole micro-batches, so nothing is
collated.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_jpeg

from contextual_cnn.contracts import Batch
from contextual_cnn.data.augmentation import Augmentation, Draws, crop_box, draw
from contextual_cnn.data.on_device import augment, normalise
from contextual_cnn.data.randaugment import pil_ops
from contextual_cnn.data.randaugment.policy import Op, fill_color
from contextual_cnn.data.reader import read_image, unreadable
from contextual_cnn.data.sampler import TrainSampler, evaluation_batches
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.errors import UserError


def train_batches(
    images: ImageSource,
    sampler: TrainSampler,
    augmentation: Augmentation,
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

    def make(n: int) -> tuple[np.ndarray, np.ndarray]:
        batch = sampler[n]
        draws = draw(augmentation, sampler.seed, batch)
        pixels = np.empty((len(batch.indices), image_size, image_size, 3), np.uint8)
        for i, index in enumerate(batch.indices):
            image = _crop(_decode(images, index), draws, i, augmentation, image_size)
            pixels[i] = image if on_device else _augment(image, draws, i, augmentation, fill)
        return pixels, images.targets[batch.indices]

    loader = _loader(make, count(), threads, prefetch, device)
    for n, (pixels, targets) in enumerate(_on_device(loader, device)):
        if on_device:
            draws = draw(augmentation, sampler.seed, sampler[n])
            pixels = augment(pixels, draws, fill=fill, interpolation=augmentation.interpolation)
        yield Batch(normalise(pixels, mean, std), targets)


class EvaluationBatches:
    """As `dali.EvaluationBatches`, by timm's own transform."""

    def __init__(
        self,
        images: ImageSource,
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

        def make(n: int) -> tuple[np.ndarray, np.ndarray]:
            pixels = [
                transform(Image.fromarray(_decode(images, index))).permute(1, 2, 0).numpy() for index in shares[n]
            ]
            return np.stack(pixels), images.targets[shares[n]]

        self._mean, self._std, self._device = mean, std, device
        self._loader = _loader(make, range(len(shares)), threads, prefetch, device)

    def __iter__(self) -> Iterator[Batch]:
        """One pass."""
        for pixels, targets in _on_device(self._loader, self._device):
            yield Batch(normalise(pixels, self._mean, self._std), targets)


class _Made(Dataset):
    """Whatever `make` gives for a number; a UserError is passed on as its two texts, which survive the process."""

    def __init__(self, make: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> None:
        self._make = make

    def __getitem__(self, n: int) -> tuple:
        try:
            pixels, targets = self._make(n)
        except UserError as error:
            return error.cause, error.fix
        return torch.from_numpy(pixels), torch.from_numpy(targets)


def _loader(make: Callable, numbers, workers: int, prefetch: int, device: torch.device) -> DataLoader:
    return DataLoader(
        _Made(make),
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        persistent_workers=True,
        multiprocessing_context="fork",  # what is to be made is a function here, which cannot be sent to a process
        pin_memory=device.type == "cuda",
    )


def _on_device(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, 3, H, W) uint8 channels_last and (B,) int64."""
    for pixels, targets in loader:
        if isinstance(pixels, str):
            raise UserError(pixels, targets)
        yield pixels.to(device, non_blocking=True).permute(0, 3, 1, 2), targets.to(device, non_blocking=True)


def _decode(images: ImageSource, index: int) -> np.ndarray:
    """(H, W, 3) uint8, PIL's pixels.

    Raises:
        UserError: naming the image.
    """
    encoded = read_image(images, index)
    try:
        image = Image.open(io.BytesIO(encoded))
        if image.format == "JPEG" and image.mode == "RGB":
            return _decode_jpeg(encoded)
        return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise unreadable(images.name(index), str(error)) from error


def _decode_jpeg(encoded: bytes) -> np.ndarray:
    """By torchvision: the same libjpeg and the same pixels in two thirds of PIL's time."""
    return decode_jpeg(torch.from_numpy(np.frombuffer(encoded, np.uint8).copy())).permute(1, 2, 0).numpy()


def _crop(image: np.ndarray, draws: Draws, i: int, augmentation: Augmentation, size: int) -> np.ndarray:
    """(size, size, 3) uint8. torch's resampling of bytes is Pillow's in a third of the time, but for roundings."""
    top, left, height, width = crop_box(draws, i, *image.shape[:2], augmentation.ratio)
    crop = np.ascontiguousarray(image[top : top + height, left : left + width])
    resized = interpolate(torch.from_numpy(crop).permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _augment(pixels: np.ndarray, draws: Draws, i: int, augmentation: Augmentation, fill: tuple[int, ...]) -> np.ndarray:
    """RandAugment or color jitter by timm, and the flip."""
    if draws.ops is not None and (draws.ops.op[i] != Op.NONE).any():
        options = dict(fill=fill, interpolation=augmentation.interpolation)
        image = pil_ops.apply_ops(Image.fromarray(pixels), draws.ops.op[i], draws.ops.argument[i], **options)
        pixels = np.asarray(image)
    return pixels[:, ::-1] if draws.flip[i] else pixels

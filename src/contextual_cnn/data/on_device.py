"""What is left to do for a batch of uint8 images on its device, where the loader did not do it."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from contextual_cnn.data.augmentation import Draws
from contextual_cnn.data.randaugment import torch_ops
from contextual_cnn.data.transfer import to_device


def augment(images: Tensor, draws: Draws, *, fill: tuple[int, ...], interpolation: str) -> Tensor:
    """RandAugment or color jitter, and the flips, of (B, 3, H, W) uint8 images. See `torch_ops.apply_ops`."""
    assert draws.ops is not None  # the caller's policy has drawn some
    images = torch_ops.apply_ops(images, draws.ops, fill=fill, interpolation=interpolation)
    flipped = to_device(np.flatnonzero(draws.flip), images.device)
    images[flipped] = images[flipped].flip(3)
    return images


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) uint8 -> float32, channels_last. mean, std: for values in 0..1."""
    pixels = images.permute(0, 2, 3, 1)
    # By whole rows: a CPU is twice as fast along 3 W values as along three
    statistics = to_device(np.array([mean, std], dtype=np.float32), images.device)
    means, stds = statistics.repeat(1, images.shape[3]) * 255
    return pixels.flatten(2).float().sub_(means).div_(stds).view(pixels.shape).permute(0, 3, 1, 2)

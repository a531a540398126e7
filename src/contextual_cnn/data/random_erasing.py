"""timm's RandomErasing, mode "pixel", for a whole batch: no loop over images, nothing asked of the device.

Random Erasing Data Augmentation (Zhong et al., AAAI 2020); numbers and distribution as timm.data.random_erasing.
"""

import math

import numpy as np
import torch
from torch import Tensor

from contextual_cnn.data.transfer import to_device
from contextual_cnn.randomness import Places, Purpose

_AREA = (0.02, 1 / 3)  # share of the image
_LOG_ASPECT = (math.log(0.3), -math.log(0.3))
_ATTEMPTS = 10
_COLUMNS = 2 * _ATTEMPTS + 4  # numbers drawn for an image: area and aspect ten times, whether, where, and its noise


def erase_randomly(images: Tensor, probability: float, places: Places | None) -> Tensor:
    """(B, C, H, W) normalised images, changed in place: some get a rectangle of N(0, 1) noise.

    Args:
        places: by which rectangles and noise are drawn. None: by torch's global generators, as runs of DRAWS 1 did.
    """
    if places is None:
        u = torch.rand(len(images), _COLUMNS - 1, dtype=torch.float64).numpy()
    else:
        u = places.uniform(Purpose.ERASING, _COLUMNS)
    owners, tops, lefts, heights, widths = _choose_boxes(u, images.shape[2], images.shape[3], probability)
    sizes = heights * widths
    total = int(sizes.sum())
    firsts = np.cumsum(sizes) - sizes
    boxes = to_device(np.stack([owners, tops, lefts, widths, firsts], axis=1), images.device)
    repeats = to_device(sizes, images.device)
    image, top, left, width, first = boxes.repeat_interleave(repeats, dim=0, output_size=total).unbind(1)
    place = torch.arange(total, device=images.device) - first  # of an erased pixel within its rectangle
    keys = None if places is None else (u[owners, -1] * 2**53).astype(np.int64)
    noise = _noise(sizes, keys, images)
    images.permute(0, 2, 3, 1)[image, top + place // width, left + place % width] = noise
    return images


def _noise(sizes: np.ndarray, keys: np.ndarray | None, images: Tensor) -> Tensor:
    """(all pixels, C) of N(0, 1): each rectangle's own, by its key."""
    noise = images.new_empty(int(sizes.sum()), images.shape[1])
    if keys is None:
        return noise.normal_()
    draw = torch.Generator(images.device)
    for rectangle, key in zip(noise.split(sizes.tolist()), keys, strict=True):
        rectangle.normal_(generator=draw.manual_seed(int(key)))
    return noise


def _choose_boxes(u: np.ndarray, height: int, width: int, probability: float) -> tuple[np.ndarray, ...]:
    """Image, top, left, height and width of each rectangle, int64; the first of ten attempts that fits.

    Args:
        u: (B, 23 or more) of [0, 1).
    """
    area = height * width * _between(*_AREA, u[:, :_ATTEMPTS])
    aspect = np.exp(_between(*_LOG_ASPECT, u[:, _ATTEMPTS : 2 * _ATTEMPTS]))
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < height) & (widths < width)
    chosen, row, column = u[:, 2 * _ATTEMPTS : 2 * _ATTEMPTS + 3].T
    image = np.flatnonzero((chosen < probability) & fits.any(axis=1))
    first = fits.argmax(axis=1)[image]
    box_height, box_width = heights[image, first], widths[image, first]
    top = np.floor(row[image] * (height - box_height + 1))
    left = np.floor(column[image] * (width - box_width + 1))
    return tuple(values.astype(np.int64) for values in (image, top, left, box_height, box_width))


def _between(low: float, high: float, share: np.ndarray) -> np.ndarray:
    return low + (high - low) * share

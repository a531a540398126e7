"""The operations on a batch in torch, exactly PIL's pixels, bicubic included; on any device.

What each image needs is known on the host, so images of one operation are gathered without asking the device.
Each formula follows Pillow's: blending in float32, geometry in float64, both truncated.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from contextual_cnn.data.randaugment.policy import GEOMETRY, ImageOps, Op, affine_matrices
from contextual_cnn.data.transfer import to_device

_SMOOTH = np.array(((1, 1, 1), (1, 5, 1), (1, 1, 1)), dtype=np.float64)  # over 13: Pillow's ImageFilter.SMOOTH


def apply_ops(images: Tensor, ops: ImageOps, *, fill: tuple[int, ...], interpolation: str) -> Tensor:
    """(B, 3, H, W) uint8 -> the same, each image through its layers.

    Args:
        fill: RGB outside of a moved image. interpolation: "bilinear" or "bicubic".
    """
    images = images.clone()
    matrices = affine_matrices(ops, *images.shape[2:])
    for layer in range(ops.op.shape[1]):
        op = ops.op[:, layer]
        for kind, function in _FUNCTIONS.items():
            chosen = np.flatnonzero(op == kind)
            if len(chosen):
                argument = to_device(ops.argument[chosen, layer].reshape(-1, 1, 1, 1), images.device)
                _replace(images, chosen, function, argument)
        moved = np.flatnonzero(np.isin(op, GEOMETRY))
        if len(moved):
            matrix = to_device(matrices[moved, layer], images.device)
            _replace(images, moved, _warp, matrix, fill, interpolation)
    return images


def _replace(images: Tensor, chosen: np.ndarray, function: Callable[..., Tensor], *arguments: object) -> None:
    indices = to_device(chosen, images.device)
    images[indices] = function(images[indices], *arguments)


def _auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    low, high = (bound.double() for bound in (x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)))
    scale = torch.full_like(low, 255) / (high - low)  # 255 / tensor would be 255 * (1 / tensor)
    stretched = (x * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, x).to(torch.uint8)


def _equalize(x: Tensor, _: Tensor) -> Tensor:
    levels = x.flatten(2).long()
    histogram = torch.zeros(*x.shape[:2], 256, dtype=torch.int64, device=x.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels))
    at_highest = histogram.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - at_highest) // 255
    below = histogram.cumsum(2) - histogram
    table = torch.where(step > 0, (step // 2 + below) // step.clamp(min=1), torch.arange(256, device=x.device))
    return table.clamp(max=255).gather(2, levels).view_as(x).to(torch.uint8)


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    return x & (256 - 2 ** (8 - bits)).to(torch.uint8)


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x < threshold, x, 255 - x)


def _solarize_add(x: Tensor, add: Tensor) -> Tensor:
    return torch.where(x < 128, x + add.to(torch.uint8), x)


def _color(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(x), x, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = (_grey(x).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean, x, factor)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(torch.zeros_like(x), x, factor)


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    kernel = to_device(_SMOOTH, x.device).expand(3, 1, 3, 3)
    smooth = x.clone()
    sums = torch.nn.functional.conv2d(x.double(), kernel, groups=3)
    smooth[:, :, 1:-1, 1:-1] = (sums / 13 + 0.5).to(torch.uint8)  # Pillow leaves the border as it is
    return _blend(smooth, x, factor)


def _blend(start: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    start = start.float()
    return (start + factor.float() * (x - start)).clamp(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    red, green, blue = x.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _warp(x: Tensor, matrix: Tensor, fill: tuple[int, ...], interpolation: str) -> Tensor:
    """Pillow's affine transform: neighbours clamped to the image, the fill where the source point is outside.

    Args:
        x: (k, 3, H, W) uint8. matrix: (k, 2, 3) float64, from output to input pixels.
    """
    height, width = x.shape[2:]
    column = torch.arange(width, dtype=torch.float64, device=x.device) + 0.5
    row = torch.arange(height, dtype=torch.float64, device=x.device).view(-1, 1) + 0.5
    a, b, c, d, e, f = (value.view(-1, 1, 1) for value in matrix.flatten(1).unbind(1))
    source_x, source_y = a * column + b * row + c, d * column + e * row + f  # (k, H, W)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    taps, combine = ((0, 1), _linear) if interpolation == "bilinear" else ((-1, 0, 1, 2), _cubic)
    left, above = (source_x - 0.5).floor(), (source_y - 0.5).floor()
    pixels = x.flatten(2)

    def at(dx: int, dy: int) -> Tensor:
        index = (above + dy).clamp(0, height - 1) * width + (left + dx).clamp(0, width - 1)
        return pixels.gather(2, index.long().flatten(1).unsqueeze(1).expand(-1, 3, -1)).view_as(x).double()

    along_x, along_y = ((source - 0.5 - floor).unsqueeze(1) for source, floor in ((source_x, left), (source_y, above)))
    rows = [combine([at(dx, dy) for dx in taps], along_x) for dy in taps]
    moved = combine(rows, along_y).clamp(0, 255).to(torch.uint8)
    color = to_device(np.array(fill, dtype=np.uint8), x.device).view(3, 1, 1)
    return torch.where(inside.unsqueeze(1), moved, color)


def _linear(taps: list[Tensor], t: Tensor) -> Tensor:
    first, second = taps
    return first + (second - first) * t


def _cubic(taps: list[Tensor], t: Tensor) -> Tensor:
    """Pillow's cubic for transforms, a = -1 (its resize has a = -0.5)."""
    v1, v2, v3, v4 = taps
    return v2 + t * (v3 - v1 + t * (2 * (v1 - v2) + v3 - v4 + t * (v2 - v1 - v3 + v4)))


_FUNCTIONS = {
    Op.AUTO_CONTRAST: _auto_contrast,
    Op.EQUALIZE: _equalize,
    Op.INVERT: lambda x, _: 255 - x,
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: _solarize,
    Op.SOLARIZE_ADD: _solarize_add,
    Op.COLOR: _color,
    Op.CONTRAST: _contrast,
    Op.BRIGHTNESS: _brightness,
    Op.SHARPNESS: _sharpness,
}

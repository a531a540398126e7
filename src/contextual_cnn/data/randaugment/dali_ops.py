"""The operations as a DALI graph, one definition for CPU and GPU.

All that is drawn comes in as numbers; the graph holds no random operator. An image passes only through the branch
that it needs, and the branches share what they can: two layers take some 320 operators. DALI's own operators of
these names differ from PIL's by whole levels, hence the compositions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode

from contextual_cnn.data.randaugment.policy import GEOMETRY, ImageOps, Op, affine_matrices

# The branches of the graph; plain integers, because DALI compares with nothing else
_NONE, _LEVELS, _MOVE, _BRIGHTNESS, _CONTRAST, _COLOR, _SHARPNESS, _AUTO_CONTRAST, _EQUALIZE = range(9)
_BRANCH = {
    **dict.fromkeys((Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD), _LEVELS),
    **dict.fromkeys(GEOMETRY, _MOVE),
    Op.BRIGHTNESS: _BRIGHTNESS,
    Op.CONTRAST: _CONTRAST,
    Op.COLOR: _COLOR,
    Op.SHARPNESS: _SHARPNESS,
    Op.AUTO_CONTRAST: _AUTO_CONTRAST,
    Op.EQUALIZE: _EQUALIZE,
}
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13  # PIL's ImageFilter.SMOOTH
_JUST_BELOW = 3e-4  # guards a truncation against float32's rounding
_ON_A_PIXEL = 1e-3  # a position this close below a pixel counts as on it, in the warp and in its weights
_INVERT = types.Constant(255, dtype=types.UINT8)  # as the other side of an exclusive or
# 1.5 * 2**23: a float32 added to it keeps its integer part in its last bits
_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000

# What an external source hands over for `apply_ops`: its outputs' types and dimensions
INPUTS = [(types.INT32, 1), (types.FLOAT, 1), (types.INT32, 2), (types.FLOAT, 3)]


def inputs(ops: ImageOps, size: int) -> tuple[np.ndarray, ...]:
    """The numbers that the graph reads, for images of size x size.

    Returns:
        branch (n, layers) int32; factor (n, layers) float32; levels (n, layers, 3) int32: the level from which on
        all are inverted, the mask of the bits kept, what is added below 128; matrices (n, layers, 2, 3) float32.
    """
    op, argument = ops.op, ops.argument
    branch = np.full(op.shape, _NONE, dtype=np.int32)
    for kind, number in _BRANCH.items():
        branch[op == kind] = number
    levels = np.empty((*op.shape, 3), dtype=np.int32)
    levels[..., 0] = np.select([op == Op.INVERT, op == Op.SOLARIZE], [0, argument], 256)
    levels[..., 1] = np.where(op == Op.POSTERIZE, 256 - 2 ** (8 - np.clip(argument, 0, 8)), 255)
    levels[..., 2] = np.where(op == Op.SOLARIZE_ADD, argument, 0)
    return branch, argument.astype(np.float32), levels, affine_matrices(ops, size, size).astype(np.float32)


def apply_ops(
    images: DataNode,
    inputs: Sequence[DataNode],
    layers: int,
    *,
    size: int,
    fill: tuple[int, ...],
    interpolation: str,
    on: str,
) -> DataNode:
    """(size, size, 3) uint8 images -> the same, each through its layers; within a pipeline with conditionals.

    Args:
        inputs: the nodes of what `inputs` returned. on: "cpu" or "cuda".
    """
    branch, factor, levels, matrices = inputs
    pixels = _Pixels(size, fill, interpolation, "gpu" if on == "cuda" else "cpu")
    for layer in range(layers):
        images = _apply_layer(
            images, branch[layer], pixels.here(factor[layer]), pixels.here(levels[layer]), matrices[layer], pixels
        )
    return images


def _apply_layer(
    images: DataNode, branch: DataNode, factor: DataNode, levels: DataNode, matrix: DataNode, pixels: "_Pixels"
) -> DataNode:
    if branch == _NONE:
        result = images
    elif branch == _LEVELS:
        result = pixels.change_levels(images, levels)
    else:
        if branch == _MOVE:
            values = pixels.move(images, matrix)
        elif branch == _BRIGHTNESS:
            values = images * factor
        elif branch == _CONTRAST:
            values = pixels.contrast(images, factor)
        elif branch == _COLOR:
            values = pixels.color(images, factor)
        elif branch == _SHARPNESS:
            values = pixels.sharpness(images, factor)
        elif branch == _AUTO_CONTRAST:
            values = pixels.auto_contrast(images)
        else:
            values = pixels.equalize(images)
        result = _truncate(values)
    return result


def _truncate(values: DataNode) -> DataNode:
    """Float levels -> uint8, cut off like PIL, saturated. DALI's own cast rounds, one value at a time on a CPU."""
    bits = fn.reinterpret(values + (_JUST_BELOW - 0.5) + _MAGIC, dtype=types.INT32)
    return fn.cast(bits - _MAGIC_BITS, dtype=types.UINT8)


class _Pixels:
    """The operations on nodes of one pipeline; all but `change_levels` return float levels to be truncated."""

    def __init__(self, size: int, fill: tuple[int, ...], interpolation: str, device: str) -> None:
        self.size, self.interpolation, self.device = size, interpolation, device
        self.fill = np.array(fill, dtype=np.float32)

    def here(self, node: DataNode) -> DataNode:
        return node.gpu() if self.device == "gpu" else node

    def constant(self, values: np.ndarray) -> DataNode:
        return types.Constant(values, device=self.device)

    def change_levels(self, x: DataNode, levels: DataNode) -> DataNode:
        inverted = fn.cast(x >= levels[0], dtype=types.UINT8) * _INVERT
        raised = fn.cast(x < 128, dtype=types.UINT8) * fn.cast(levels[2], dtype=types.UINT8)
        return ((x ^ inverted) & fn.cast(levels[1], dtype=types.UINT8)) + raised

    def contrast(self, x: DataNode, factor: DataNode) -> DataNode:
        mean = dali_math.floor(fn.reductions.mean(_grey(x)) + 0.5)
        return x * factor + mean * (1.0 - factor)

    def color(self, x: DataNode, factor: DataNode) -> DataNode:
        grey = fn.color_space_conversion(_grey(x), image_type=types.GRAY, output_type=types.RGB)
        return x * factor + grey * (1.0 - factor)

    def sharpness(self, x: DataNode, factor: DataNode) -> DataNode:
        smooth = fn.filter(x, self.constant(_SMOOTH), dtype=types.UINT8)
        inner = np.zeros((self.size, self.size, 3), dtype=np.float32)
        inner[1:-1, 1:-1] = 1  # PIL leaves the border as it is
        return x + (smooth * 1.0 - x) * (self.constant(inner) * (1.0 - factor))

    def auto_contrast(self, x: DataNode) -> DataNode:
        low, high = (bound(x, axes=[0, 1]) * 1.0 for bound in (fn.reductions.min, fn.reductions.max))
        flat = fn.cast(high == low, dtype=types.FLOAT)  # such a channel stays: (x - 0) * 1
        scale = 255.0 / (high - low + flat * 255.0)
        return (x - low * (1.0 - flat)) * scale

    def equalize(self, x: DataNode) -> DataNode:
        # PIL counts the levels below a level, DALI those up to it: the same thing from the other end
        equal = _INVERT ^ fn.equalize(_INVERT ^ x)
        highest = fn.reductions.max(x, axes=[0, 1])
        at_highest = fn.reductions.sum(fn.cast(x == highest, dtype=types.FLOAT), axes=[0, 1])
        others = float(self.size**2) - at_highest
        step = dali_math.floor(others * (1 / 255) + _JUST_BELOW)
        stays = fn.cast(step == 0.0, dtype=types.FLOAT)  # few levels: PIL gives up
        # PIL rounds here, which is to cut off half a level higher
        return equal * (others / (255.0 * step + stays) * (1.0 - stays)) + x * stays + 0.5

    def move(self, x: DataNode, matrix: DataNode) -> DataNode:
        # DALI clamps neighbours like PIL if it is given no fill; what is outside, a nearest warp of ones tells
        ones = fn.reshape(self.constant(np.ones((self.size, self.size, 3), dtype=np.uint8)), layout="HWC")
        inside = fn.warp_affine(ones, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0.0)
        if self.interpolation == "bicubic":
            moved = self.bicubic(x, matrix)
        else:
            moved = fn.warp_affine(x, matrix=matrix, interp_type=types.INTERP_LINEAR, dtype=types.FLOAT)
        return (moved - self.constant(self.fill)) * inside + self.constant(self.fill)

    def bicubic(self, x: DataNode, matrix: DataNode) -> DataNode:
        """The sixteen neighbours by nearest warps, which is all that DALI has, times PIL's weights."""
        row, column = np.indices((self.size, self.size, 3), dtype=np.float32)[:2]
        here = self.here(matrix)
        x_of, y_of = self.constant(column + 0.5), self.constant(row + 0.5)
        weights_x, weights_y = (
            _cubic_weights(here[i, 0] * x_of + here[i, 1] * y_of + (here[i, 2] - 0.5)) for i in (0, 1)
        )
        total: Any = 0.0  # a number at first, then a node
        for i in range(4):
            along_x: Any = 0.0
            for j in range(4):
                shift = np.array([[0, 0, j - 1.5 + _ON_A_PIXEL], [0, 0, i - 1.5 + _ON_A_PIXEL]], dtype=np.float32)
                tap = fn.warp_affine(
                    x, matrix=matrix + types.Constant(shift), interp_type=types.INTERP_NN, dtype=types.FLOAT
                )
                along_x = tap * weights_x[j] + along_x
            total = along_x * weights_y[i] + total
        return total


def _cubic_weights(position: DataNode) -> tuple[DataNode, ...]:
    """Of the neighbours at -1, 0, 1 and 2 from the pixel left of a position; a = -1, as PIL's transforms have it."""
    t = position - dali_math.floor(position + _ON_A_PIXEL)
    square = t * t
    cube = square * t
    return 2.0 * square - t - cube, 1.0 - 2.0 * square + cube, t + square - cube, cube - square


def _grey(x: DataNode) -> DataNode:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)

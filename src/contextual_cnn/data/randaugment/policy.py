"""Which operation is applied to which image, and how strongly: numbers only, no pixels.

The operations and their arguments are those of timm's `rand-...-inc1` (timm.data.auto_augment); color jitter is
a policy over three of them. Every draw depends on (seed, epoch, place of the image in the epoch) alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

from contextual_cnn.randomness import Purpose, uniform_rows
from contextual_cnn.settings.augment import RandAugmentNumbers


class Op(IntEnum):
    """timm's fifteen operations in timm's order."""

    NONE = -1
    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14


GEOMETRY = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)

# An operation's argument from its strength t in [0, 1] (timm's level over ten) and a sign s of -1 or 1
ARGUMENT = {
    Op.AUTO_CONTRAST: lambda t, s: 0 * t,
    Op.EQUALIZE: lambda t, s: 0 * t,
    Op.INVERT: lambda t, s: 0 * t,
    Op.ROTATE: lambda t, s: t * 30 * s,  # degrees
    Op.POSTERIZE: lambda t, s: 4 - np.trunc(t * 4),  # bits that are kept; none at t = 1
    Op.SOLARIZE: lambda t, s: 256 - np.trunc(t * 256),  # levels from here on are inverted
    Op.SOLARIZE_ADD: lambda t, s: np.trunc(t * 110),  # added to levels below 128
    Op.COLOR: lambda t, s: np.maximum(0.1, 1 + t * 0.9 * s),  # factors: 0 is grey, black or blurred, 1 no change
    Op.CONTRAST: lambda t, s: np.maximum(0.1, 1 + t * 0.9 * s),
    Op.BRIGHTNESS: lambda t, s: np.maximum(0.1, 1 + t * 0.9 * s),
    Op.SHARPNESS: lambda t, s: np.maximum(0.1, 1 + t * 0.9 * s),
    Op.SHEAR_X: lambda t, s: t * 0.3 * s,  # pixels per pixel
    Op.SHEAR_Y: lambda t, s: t * 0.3 * s,
    Op.TRANSLATE_X: lambda t, s: t * 0.45 * s,  # share of the side
    Op.TRANSLATE_Y: lambda t, s: t * 0.45 * s,
}


@dataclass(frozen=True)
class ImageOps:
    """What is applied to each of n images, layer after layer.

    op: (n, layers) int64, values of `Op`. argument: (n, layers) float64, see `ARGUMENT`.
    """

    op: np.ndarray
    argument: np.ndarray


class Policy(Protocol):
    """Draws the operations of images `start` to `start + images` of an epoch."""

    @property
    def layers(self) -> int: ...

    def draw(self, seed: int, epoch: int, start: int, images: int) -> ImageOps: ...


@dataclass(frozen=True)
class RandAugment:
    """Each layer draws one of the fifteen and applies it with a probability, at a strength around a magnitude."""

    numbers: RandAugmentNumbers

    @property
    def layers(self) -> int:
        return self.numbers.layers

    def draw(self, seed: int, epoch: int, start: int, images: int) -> ImageOps:
        columns = 5 * self.layers
        u = uniform_rows(
            Purpose.IMAGE_OPS, seed, epoch, start=start, rows=images, columns=-(-columns // 4) * 4
        )  # to a multiple of four
        chosen, applied, sign, radius, angle = np.split(u[:, :columns], 5, axis=1)
        gauss = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * math.pi * angle)  # Box and Muller
        strength = np.clip(self.numbers.magnitude + self.numbers.magnitude_std * gauss, 0, 10) / 10
        op = np.where(applied < self.numbers.probability, np.floor(chosen * len(ARGUMENT)), Op.NONE).astype(np.int64)
        return ImageOps(op, _arguments(op, strength, np.where(sign < 0.5, -1, 1)))


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter(amount, amount, amount), as timm applies it: three operations in random order.

    amount: brightness, contrast and saturation are changed by factors from max(0, 1 - amount) to 1 + amount.
    """

    amount: float
    layers = 3

    def draw(self, seed: int, epoch: int, start: int, images: int) -> ImageOps:
        u = uniform_rows(Purpose.IMAGE_OPS, seed, epoch, start=start, rows=images, columns=8)
        order = np.argsort(u[:, :3], axis=1)
        low, high = max(0.0, 1 - self.amount), 1 + self.amount
        return ImageOps(np.array([Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR])[order], low + (high - low) * u[:, 3:6])


def affine_matrices(ops: ImageOps, height: int, width: int) -> np.ndarray:
    """PIL's matrices from output to input pixels; the identity for what is no geometry.

    Returns:
        (n, layers, 2, 3) float64.
    """
    op, argument = ops.op, ops.argument
    matrices = np.zeros((*op.shape, 2, 3))
    matrices[..., 0, 0] = matrices[..., 1, 1] = 1
    matrices[..., 0, 1] = np.where(op == Op.SHEAR_X, argument, 0)
    matrices[..., 1, 0] = np.where(op == Op.SHEAR_Y, argument, 0)
    matrices[..., 0, 2] = np.where(op == Op.TRANSLATE_X, argument * width, 0)
    matrices[..., 1, 2] = np.where(op == Op.TRANSLATE_Y, argument * height, 0)
    turned = op == Op.ROTATE
    angle = -np.radians(argument[turned])
    cos, sin = np.cos(angle).round(15), np.sin(angle).round(15)  # as PIL rounds them
    centre_x, centre_y = width / 2, height / 2
    matrices[turned] = np.stack(
        [
            *(cos, sin, cos * -centre_x + sin * -centre_y + centre_x),
            *(-sin, cos, -sin * -centre_x + cos * -centre_y + centre_y),
        ],
        axis=-1,
    ).reshape(-1, 2, 3)
    return matrices


def fill_color(mean: Sequence[float]) -> tuple[int, ...]:
    """RGB levels outside of a moved image: the mean of the normalisation, as in timm."""
    return tuple(min(255, round(255 * value)) for value in mean)


def _arguments(op: np.ndarray, strength: np.ndarray, sign: np.ndarray) -> np.ndarray:
    argument = np.zeros_like(strength)
    for kind, function in ARGUMENT.items():
        argument = np.where(op == kind, function(strength, sign), argument)
    return argument

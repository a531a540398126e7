"""timm's own training transform of a recipe: what scripts hold our loader against."""

from collections.abc import Callable, Sequence
from unittest import mock

import torch
from PIL import Image
from timm.data import create_transform

from contextual_cnn.data.randaugment.pil_ops import posterize
from contextual_cnn.settings.augment import AugmentSettings

# Pillow 13 refuses to keep no bits, which timm 1.0.31 asks for; older versions make a black image of it
PILLOW_13_PATCH = {"PosterizeIncreasing": posterize}


def timm_arguments(augment: AugmentSettings) -> dict:
    """The recipe as timm's create_transform and create_loader want it."""
    return dict(
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.randaugment,
        interpolation="bicubic",
        re_prob=augment.erasing,
        re_mode="pixel",
    )


def timm_transform(
    augment: AugmentSettings, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], torch.Tensor]:
    """RGB image -> (3, size, size) float32, normalised and erased; it draws from the global generators."""
    with mock.patch.dict("timm.data.auto_augment.NAME_TO_OP", PILLOW_13_PATCH):
        return create_transform(image_size, mean=tuple(mean), std=tuple(std), **timm_arguments(augment))

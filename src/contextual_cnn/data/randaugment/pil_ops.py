"""The operations by PIL, in timm's own functions: the reference, and what runs where there is no DALI."""

from collections.abc import Callable, Sequence

from PIL import Image
from timm.data import auto_augment as timm_ops

from contextual_cnn.data.randaugment.policy import Op

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's, but no bits kept is a black image, as it was before Pillow 13 began to refuse it."""
    return timm_ops.posterize(image, bits) if bits else Image.new(image.mode, image.size)


_FUNCTIONS: dict[int, Callable[..., Image.Image]] = {
    Op.AUTO_CONTRAST: lambda image, _, **options: timm_ops.auto_contrast(image),
    Op.EQUALIZE: lambda image, _, **options: timm_ops.equalize(image),
    Op.INVERT: lambda image, _, **options: timm_ops.invert(image),
    Op.ROTATE: timm_ops.rotate,
    Op.POSTERIZE: lambda image, bits, **options: posterize(image, int(bits)),
    Op.SOLARIZE: lambda image, threshold, **options: timm_ops.solarize(image, int(threshold)),
    Op.SOLARIZE_ADD: lambda image, add, **options: timm_ops.solarize_add(image, int(add)),
    Op.COLOR: timm_ops.color,
    Op.CONTRAST: timm_ops.contrast,
    Op.BRIGHTNESS: timm_ops.brightness,
    Op.SHARPNESS: timm_ops.sharpness,
    Op.SHEAR_X: timm_ops.shear_x,
    Op.SHEAR_Y: timm_ops.shear_y,
    Op.TRANSLATE_X: timm_ops.translate_x_rel,
    Op.TRANSLATE_Y: timm_ops.translate_y_rel,
}


def apply_ops(
    image: Image.Image, op: Sequence[int], argument: Sequence[float], *, fill: tuple[int, ...], interpolation: str
) -> Image.Image:
    """One RGB image through its layers.

    Args:
        op, argument: (layers,), a row of `ImageOps`.
        fill: RGB outside of a moved image. interpolation: "bilinear" or "bicubic".
    """
    for kind, value in zip(op, argument, strict=True):
        if kind != Op.NONE:
            image = _FUNCTIONS[kind](image, float(value), fillcolor=fill, resample=RESAMPLE[interpolation])
    return image

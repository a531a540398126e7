"""How the contextual convolutions change their kernels from image to image."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from torch import Tensor

from contextual_cnn.analysis.images import Images
from contextual_cnn.analysis.modulation import Modulation
from contextual_cnn.analysis.style import DIVERGING, figure, show_image

_CHANNELS = 6


class OffsetSizes(NamedTuple):
    """Root mean squares over channels and taps, relative to the static kernel's.

    mean: of the images' mean dw, what could as well have been in the static kernel.
    between: of the differences from it, what only a dynamic kernel can do.
    """

    mean: float
    between: float


def offset_sizes(modulation: Modulation) -> OffsetSizes:
    """Of at least two images, of a layer with weight offsets."""
    offsets = modulation.weight_offset
    assert offsets is not None
    static = _rms(modulation.static_kernel())
    mean = offsets.mean(dim=0)
    return OffsetSizes(_rms(mean) / static, _rms(offsets - mean) / static)


def most_varied_channels(weight_offset: Tensor, count: int = _CHANNELS) -> list[int]:
    """Those of (B, C, kh, kw) that differ most between the images, the most varied first."""
    varied = weight_offset.var(dim=0, correction=0).sum(dim=(1, 2))
    return varied.topk(min(count, len(varied))).indices.tolist()


def plot_weight_offsets(images: Images, modulation: Modulation, path: Path) -> None:
    """A row for each of the channels that differ most: static kernel, mean dw of the images, and by what each image's
    dw differs from it, the last under one colour scale."""
    assert modulation.weight_offset is not None
    offsets = modulation.weight_offset.cpu()
    static, mean = modulation.static_kernel().cpu(), offsets.mean(dim=0)
    channels = most_varied_channels(offsets)
    sizes = offset_sizes(modulation)
    title = (
        f"Weight offsets dw of {modulation.name}\nthe {len(channels)} channels that differ most between images\n"
        f"all channels: mean dw {sizes.mean:.1%} of the kernel w, between images {sizes.between:.1%}"
    )
    with figure(path, 1 + len(channels), 2 + len(images.names), (1.55, 1.6), title) as axes:
        for axis, pixels in zip(axes[0, 2:], images.pixels, strict=True):
            show_image(axis, pixels)
        for axis in axes[0, :2]:
            axis.set_visible(False)
        for row, channel in zip(axes[1:], channels, strict=True):
            differences = offsets[:, channel] - mean[channel]
            largest = differences.abs().max()
            _show_kernel(row[0], "w", static[channel], static[channel].abs().max())
            _show_kernel(row[1], "mean dw", mean[channel], mean[channel].abs().max())
            for axis, difference in zip(row[2:], differences, strict=True):
                _show_kernel(axis, "dw - mean", difference, largest)
            row[0].set_ylabel(f"channel {channel}")


def _show_kernel(axis: Axes, name: str, kernel: Tensor, limit: Tensor) -> None:
    show_image(axis, kernel, f"{name}, ±{limit:.2g}", cmap=DIVERGING, vmin=-limit, vmax=limit)


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()

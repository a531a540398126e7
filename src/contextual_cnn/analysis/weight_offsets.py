"""How the contextual convolutions change their kernels from image to image."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from contextual_cnn.analysis.images import Images
from contextual_cnn.analysis.modulation import Modulation
from contextual_cnn.analysis.style import DIVERGING, bare, figure, show_image

_CHANNELS = 6


class OffsetSizes(NamedTuple):
    """Root mean squares over channels and taps, relative to the static kernel's.

    mean: of the images' mean dw, what could as well have been in the static kernel.
    between: of the differences from it, what only a dynamic kernel can do.
    """

    mean: float
    between: float


def offset_sizes(modulation: Modulation) -> OffsetSizes:
    """Of at least two images."""
    static = _rms(modulation.static_kernel())
    mean = modulation.weight_offset.mean(dim=0)
    return OffsetSizes(_rms(mean) / static, _rms(modulation.weight_offset - mean) / static)


def most_varied_channels(weight_offset: Tensor, count: int = _CHANNELS) -> list[int]:
    """Those of (B, C, kh, kw) that differ most between the images, the most varied first."""
    varied = weight_offset.var(dim=0, correction=0).sum(dim=(1, 2))
    return varied.topk(min(count, len(varied))).indices.tolist()


def plot_weight_offsets(images: Images, modulation: Modulation, path: Path) -> None:
    """A row for each of the channels that differ most: static kernel, dw of each image under one colour scale, and
    the deviation between the images."""
    offsets = modulation.weight_offset.cpu()
    static = modulation.static_kernel().cpu()
    channels = most_varied_channels(offsets)
    sizes = offset_sizes(modulation)
    title = (
        f"Weight offsets of {modulation.name}, the {len(channels)} channels that differ most between images\n"
        f"all channels, relative to the kernel: mean of the images {sizes.mean:.1%}, between images {sizes.between:.1%}"
    )
    columns = 3 + len(images.names)
    with figure(path, 1 + len(channels), columns, (1.55, 1.6), title) as axes:
        for b, pixels in enumerate(images.pixels):
            show_image(axes[0, 1 + b], pixels)
        for axis in (axes[0, 0], *axes[0, -2:]):
            axis.set_visible(False)
        for row, channel in zip(axes[1:], channels, strict=True):
            changes = offsets[:, channel]
            kernel, change = static[channel].abs().max(), changes.abs().max()
            panels = [("kernel w", static[channel], kernel)]
            panels += [("dw", own, change) for own in changes]
            panels += [("mean dw", changes.mean(dim=0), change)]
            for axis, (name, values, limit) in zip(row, panels, strict=False):
                show_image(axis, values, f"{name}, ±{limit:.2g}", cmap=DIVERGING, vmin=-limit, vmax=limit)
            deviation = changes.std(dim=0, correction=0)
            show_image(row[-1], deviation, f"deviation, {deviation.max():.2g}", cmap="viridis", vmin=0)
            row[0].set_ylabel(f"channel {channel}")
            bare(row[-1])


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()

"""Where the contextual convolutions look: the sampling points of one output position, over the image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor, nn

from contextual_cnn.analysis.images import Images
from contextual_cnn.analysis.modulation import Modulation
from contextual_cnn.analysis.style import KEPT, TRUE, bare, figure, show_image

_LARGEST = 45  # area of the dot of the heaviest tap, in points squared


class ImageGrid:
    """Which pixel of the image a position of a feature map stands for: the centre of what it is computed from.

    Args:
        model: where the first convolution overlaps its neighbours (ResNet), position i is centred on pixel i * stride;
            where it cuts the image to patches (ConvNeXt), on the middle of a patch, half a stride further.
        image_size: side of the image.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        self._patches = first.kernel_size[0] == first.stride[0]
        self._image_size = image_size

    def stride(self, map_size: int) -> int:
        """Pixels from one position to the next, a power of two."""
        return 2 ** round(np.log2(self._image_size / map_size))

    def pixel(self, position: Tensor, map_size: int) -> Tensor:
        """Coordinates in a map -> coordinates in the image, where 0 is the middle of the first pixel."""
        stride = self.stride(map_size)
        return position * stride + ((stride - 1) / 2 if self._patches else 0)


def sampling_points(modulation: Modulation, output: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of an output position (row, column): the regular grid (K, 2) and the sampling points (B, K, 2), y and x in
    positions of the input map."""
    layer = modulation.layer
    geometry = layer.geometry
    taps = [torch.arange(size) * geometry["dilation"] - geometry["padding"] for size in layer.weight.shape[2:]]
    grid = torch.cartesian_prod(*taps) + torch.tensor(output) * geometry["stride"]
    row, column = output
    assert modulation.sampling_offset is not None
    offset = modulation.sampling_offset[:, :, row, column].float().cpu().unflatten(1, (-1, 2))
    return grid.float(), grid + offset


def plot_sampling_points(
    model: nn.Module, images: Images, modulations: Sequence[Modulation], point: tuple[int, int], path: Path
) -> None:
    """Two rows for each image, a column for each layer: the regular grid with the static kernel's weights, and the
    sampling points with the modulated ones.

    Args:
        modulations: with sampling offsets.
        point: row and column of a pixel; of each layer the output position nearest to it is shown.
    """
    grid = ImageGrid(model, images.pixels.shape[1])
    title = (
        f"Where the contextual layers look for the position nearest to pixel {point[0]}, {point[1]}: "
        "dots are sampling points, their areas the tap's weight, lines the way from the regular grid"
    )
    size = (2.5, 2.65)
    with figure(path, 2 * len(images.names), len(modulations), size, title) as axes:
        for column, modulation in enumerate(modulations):
            output = _nearest_output(grid, modulation, point)
            regular, moved = sampling_points(modulation, output)
            regular, moved = (_to_pixels(grid, points, modulation.input_size) for points in (regular, moved))
            static = _tap_sizes(modulation.static_kernel())
            weights = [static for _ in images.names]
            if modulation.weight_offset is not None:
                weights = [_tap_sizes(modulation.static_kernel() + offset) for offset in modulation.weight_offset]
            low, high = _limits(torch.cat([regular[None], moved]), images.pixels.shape[1])
            for b, pixels in enumerate(images.pixels):
                above, below = axes[2 * b, column], axes[2 * b + 1, column]
                shift = (moved[b] - regular).norm(dim=1).mean()
                above_title = f"{_short_name(modulation.name)}, {'x'.join(map(str, modulation.input_size))}\nregular"
                show_image(above, pixels, above_title)
                show_image(below, pixels, f"sampled, {shift:.1f} pixels away on average")
                _plot_points(above, regular, static)
                _plot_points(below, moved[b], weights[b], regular)
                for axis in (above, below):
                    axis.plot(point[1], point[0], "+", color="white", markersize=9, markeredgewidth=3, zorder=4)
                    axis.plot(point[1], point[0], "+", color="black", markersize=8, markeredgewidth=1.2, zorder=4)
                    axis.set(xlim=(low, high), ylim=(high, low), facecolor="#EEEEEE")


def _nearest_output(grid: ImageGrid, modulation: Modulation, point: tuple[int, int]) -> tuple[int, int]:
    assert modulation.sampling_offset is not None
    sizes = modulation.sampling_offset.shape[2:]
    positions = [
        (grid.pixel(torch.arange(size), size) - at).abs().argmin() for size, at in zip(sizes, point, strict=True)
    ]
    return int(positions[0]), int(positions[1])


def _to_pixels(grid: ImageGrid, points: Tensor, map_size: tuple[int, int]) -> Tensor:
    """(..., 2) y and x in the map -> in the image."""
    return torch.stack([grid.pixel(points[..., i], map_size[i]) for i in (0, 1)], dim=-1)


def _tap_sizes(kernel: Tensor) -> Tensor:
    """(C, kh, kw) -> (K,) area of the dots: a tap's mean absolute weight, the heaviest of the layer at `_LARGEST`."""
    weight = kernel.abs().mean(dim=0).flatten().cpu()
    return _LARGEST * weight / weight.max()


def _limits(points: Tensor, image_size: int) -> tuple[float, float]:
    """What shows the whole image and all points, the zeros beside the image included."""
    margin = 0.04 * (points.max() - points.min()).item()
    return min(-0.5, points.min().item() - margin), max(image_size - 0.5, points.max().item() + margin)


def _plot_points(axis: Axes, points: Tensor, sizes: Tensor, regular: Tensor | None = None) -> None:
    if regular is not None:
        ways = torch.stack([regular, points], dim=1).flip(-1).numpy()
        axis.add_collection(LineCollection(list(ways), colors=TRUE, linewidths=0.8))
    color = TRUE if regular is not None else KEPT
    axis.scatter(points[:, 1], points[:, 0], s=sizes, color=color, edgecolors="black", linewidths=0.4, zorder=3)
    bare(axis)


def _short_name(name: str) -> str:
    """stages.2.blocks.0.conv_dw -> stage 3, block 1; layer2.0.conv2 -> stage 2, block 1."""
    parts = [int(part.removeprefix("layer")) for part in name.split(".") if part.removeprefix("layer").isdigit()]
    return f"stage {parts[0] + (0 if name.startswith('layer') else 1)}, block {parts[1] + 1}"

"""The sampled convolution in plain torch, on any device: a sampled tap is a weighted bag of four pixels.

The map is a table of H*W rows of C channels; every (output position, tap) is a bag of the four pixels around
the sampling point, with the bilinear weights as per-row weights. `embedding_bag` sums the bags without a
(4x larger) gathered copy and has both gradients: to the pixels, and to the weights and thereby the offsets.
About nine times faster on a CPU than torchvision's deformable convolution with one group per sample and channel.

It does hold the sampled taps, K times the output map, until the backward pass; a fused kernel need not.

Shapes as in contextual_conv.py. The floor is taken in pixel units: normalised coordinates (grid_sample) round to
either side of a whole pixel, where a fresh layer has all its samples, and spoil the offsets' gradient there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from contextual_cnn.ops.memory_format import output_shape

_CHUNK_ELEMENTS = 64 * 2**20  # sampled taps held at once in inference: 256 MiB in float32


def forward(x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]) -> Tensor:
    """As `sampled_conv.sampled_conv2d`."""
    batch, channels = x.shape[:2]
    kernel, out = weight.shape[2:], output_shape(offset, mask)
    exact = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(exact).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, K, C)
    pixels = x.to(exact).permute(0, 2, 3, 1)  # (B, H, W, C)
    rows, columns = (t.to(exact).expand(batch, -1, -1) for t in regular_grid(kernel, out, geometry, x.device))
    if offset is not None:
        shift = offset.to(exact).unflatten(1, (-1, 2)).permute(0, 3, 4, 1, 2).flatten(1, 2)  # (B, P, K, 2)
        rows, columns = rows + shift[..., 0], columns + shift[..., 1]
    amount = mask.to(exact).flatten(2).transpose(1, 2) if mask is not None else torch.ones_like(rows)  # (B, P, K)
    if batch == 0:
        return x.new_zeros(0, channels, *out)
    size = max(1, _CHUNK_ELEMENTS // (channels * rows[0].numel()))
    chunks = zip(*(t.split(size) for t in (pixels, taps, rows, columns, amount)), strict=True)
    y = torch.cat([_convolve(*chunk) for chunk in chunks])
    return y.unflatten(1, out).permute(0, 3, 1, 2).to(x.dtype)


def regular_grid(
    kernel: Sequence[int], out: Sequence[int], geometry: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and column of every tap without offsets, p + g(k): each (P, K)."""
    stride, padding, dilation = geometry
    # Along each axis: (output positions, taps)
    rows, columns = (
        (torch.arange(positions, device=device) * stride - padding)[:, None]
        + torch.arange(taps, device=device) * dilation
        for positions, taps in zip(out, kernel, strict=True)
    )
    shape = (*out, *kernel)
    rows, columns = rows[:, None, :, None].expand(shape), columns[None, :, None, :].expand(shape)
    return rows.flatten(0, 1).flatten(1), columns.flatten(0, 1).flatten(1)


def _convolve(pixels: Tensor, taps: Tensor, y: Tensor, x: Tensor, amount: Tensor) -> Tensor:
    """(B, H, W, C) pixels, (B, 1, K, C) taps, (B, P, K) rows, columns and factors -> (B, P, C)."""
    batch, height, width, channels = pixels.shape
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    first_row = torch.arange(batch, device=pixels.device).view(-1, 1, 1) * (height * width)
    rows, weights = [], []
    for row, row_weight in ((top, 1 - down), (top + 1, down)):
        for column, column_weight in ((left, 1 - right), (left + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            # Clamped before the cast: a position far outside, or NaN, has no int64
            index = row.clamp(0, height - 1).long().clamp(0, height - 1) * width
            index = index + column.clamp(0, width - 1).long().clamp(0, width - 1)
            rows.append(first_row + index)
            weights.append(row_weight * column_weight * inside)
    weight = torch.stack(weights, dim=-1) * amount.unsqueeze(-1)  # (B, P, K, 4)
    bags = embedding_bag(
        torch.stack(rows, dim=-1).view(-1, 4),
        pixels.reshape(-1, channels),
        per_sample_weights=weight.reshape(-1, 4),
        mode="sum",
    )
    return (bags.view(*y.shape, channels) * taps).sum(dim=2)

"""The sampled convolution in plain torch, on any device: a sampled tap is a weighted bag of four pixels.

The map is a table of H*W rows of C channels; every (output position, tap) is a bag of the four pixels around
the sampling point, with the bilinear weights as per-row weights. `embedding_bag` sums the bags without a
(4x larger) gathered copy and has both gradients: to the pixels, and to the weights and thereby the offsets.
About 28 times faster on a CPU than torchvision's deformable convolution with one group per channel.

It does hold the sampled taps, K times the output map, until the backward pass; a fused kernel need not.

Shapes as in contextual_conv.py. The floor is taken in pixel units: normalised coordinates (grid_sample) round to
either side of a whole pixel, where a fresh layer has all its samples, and spoil the offsets' gradient there.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_CHUNK_ELEMENTS = 64 * 2**20  # sampled taps held at once in inference: 256 MiB in float32


def forward(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """As `sampled_conv.sampled_conv2d`."""
    batch, channels = x.shape[:2]
    kh, kw = weight.shape[2:]
    like = offset if offset is not None else mask
    out_height, out_width = like.shape[2:]
    exact = torch.promote_types(x.dtype, torch.float32)
    # The taps' weights in the table's layout: (B, 1, K, C)
    taps = weight.to(exact).flatten(2).transpose(1, 2).unsqueeze(1)
    pixels = x.to(exact).permute(0, 2, 3, 1)  # (B, H, W, C)
    y, x_ = _positions(kh, kw, out_height, out_width, stride, padding, dilation, like.device, exact)
    if offset is not None:
        shift = offset.to(exact).unflatten(1, (kh * kw, 2)).permute(0, 3, 4, 1, 2).flatten(1, 2)  # (B, P, K, 2)
        y, x_ = y + shift[..., 0], x_ + shift[..., 1]
    else:
        y, x_ = y.expand(batch, -1, -1), x_.expand(batch, -1, -1)
    amount = mask.to(exact).flatten(2).transpose(1, 2) if mask is not None else None  # (B, P, K)

    per_sample = out_height * out_width * kh * kw * channels
    size = max(1, _CHUNK_ELEMENTS // max(1, per_sample))
    chunks = [
        _convolve(
            pixels[i : i + size],
            taps[i : i + size],
            y[i : i + size],
            x_[i : i + size],
            amount[i : i + size] if amount is not None else None,
        )
        for i in range(0, batch, size)
    ]
    out = torch.cat(chunks) if chunks else pixels.new_zeros(0, out_height * out_width, channels)
    return out.unflatten(1, (out_height, out_width)).permute(0, 3, 1, 2).to(x.dtype)


def _positions(kh, kw, out_height, out_width, stride, padding, dilation, device, dtype) -> tuple[Tensor, Tensor]:
    """Row and column of every tap of the regular grid, p + g(k): each (1, P, K)."""
    rows = (torch.arange(out_height, device=device) * stride - padding)[:, None] + torch.arange(
        kh, device=device
    ) * dilation
    columns = (torch.arange(out_width, device=device) * stride - padding)[:, None] + torch.arange(
        kw, device=device
    ) * dilation
    shape = (out_height, out_width, kh, kw)
    y = rows[:, None, :, None].expand(shape).reshape(1, out_height * out_width, kh * kw)
    x = columns[None, :, None, :].expand(shape).reshape(1, out_height * out_width, kh * kw)
    return y.to(dtype), x.to(dtype)


def _convolve(pixels: Tensor, taps: Tensor, y: Tensor, x: Tensor, amount: Tensor | None) -> Tensor:
    """(B, H, W, C) pixels, (B, 1, K, C) taps, (B, P, K) coordinates -> (B, P, C)."""
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
    weight = torch.stack(weights, dim=-1)  # (B, P, K, 4)
    if amount is not None:
        weight = weight * amount.unsqueeze(-1)
    bags = embedding_bag(
        torch.stack(rows, dim=-1).view(-1, 4),
        pixels.reshape(-1, channels),
        per_sample_weights=weight.reshape(-1, 4),
        mode="sum",
    )
    return (bags.view(*y.shape, channels) * taps).sum(dim=2)

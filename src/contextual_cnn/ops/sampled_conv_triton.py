"""The sampled convolution on a GPU, in Triton: no buffer of sampled taps, no atomics, hence the same bits every time.

Three kernels, all with channels innermost (channels_last):

* forward: a block of positions and channels walks through the taps, four gathered pixels each;
* gradients of weights, offsets and mask: a tap and a block of channels walk through the positions;
* gradient of x: a block of pixels collects from all sampling points near it. Bilinear interpolation is a product of
  two hats, max(0, 1 - |distance|), so what the points of a tap give to the pixels is a matrix of hats times the
  upstream gradient: work for the tensor cores. Blocks of points whose rows cannot reach the pixels are skipped.

The hat is right for the gradient of x only: at whole pixels it has no one-sided slope (see sampled_conv_torch.py),
so the offsets' gradient uses the floor form.

Shapes: x (B, H, W, C), w (B, K, C), offset (B, P, K, 2), mask (B, P, K), y (B, P, C); P = Ho Wo positions,
Q = H W pixels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from contextual_cnn.ops.layout import map_back, pixels, taps, taps_back

_POSITIONS, _CHANNELS = 16, 64  # a block; measured nowhere yet, chosen for no register spills on sm_90
_PIXELS = 64
_HAT_POSITIONS = 64


@triton.jit
def _sampling_points(
    offset, b, p, k, in_range, P, out_width, stride, padding, dilation, K: tl.constexpr, KW: tl.constexpr
):
    """Row and column, in pixels, at which tap k of the positions p samples."""
    y = (p // out_width * stride - padding + k // KW * dilation).to(tl.float32)
    x = (p % out_width * stride - padding + k % KW * dilation).to(tl.float32)
    if offset is not None:
        at = offset + ((b * P + p) * K + k) * 2
        y += tl.load(at, mask=in_range, other=0.0).to(tl.float32)
        x += tl.load(at + 1, mask=in_range, other=0.0).to(tl.float32)
    return y, x


@triton.jit
def _corner(top, left, DOWN: tl.constexpr, RIGHT: tl.constexpr, H, W):
    """Index of a corner pixel, and 1 where it is on the map, 0 (and index 0) where it is not."""
    row, column = top + DOWN, left + RIGHT
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    index = tl.where(inside, row * W + column, 0.0).to(tl.int32)
    return index, inside.to(tl.float32)


@triton.jit
def _gather(x, b, index, c, in_map, Q, C):
    """(positions, channels) pixels of a sample, as float32."""
    return tl.load(x + (b * Q + index)[:, None] * C + c[None, :], mask=in_map, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, w, offset, mask, y, H, W, C, P, out_width, stride, padding, dilation,
    K: tl.constexpr, KW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    here = (p < P)[:, None] & (c < C)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for k in range(K):
        row, column = _sampling_points(offset, b, p, k, p < P, P, out_width, stride, padding, dilation, K, KW)
        top, left = tl.floor(row), tl.floor(column)
        down, right = row - top, column - left
        amount = tl.load(mask + (b * P + p) * K + k, mask=p < P, other=0.0).to(tl.float32) if mask is not None else 1.0
        i0, in0 = _corner(top, left, 0, 0, H, W)
        i1, in1 = _corner(top, left, 0, 1, H, W)
        i2, in2 = _corner(top, left, 1, 0, H, W)
        i3, in3 = _corner(top, left, 1, 1, H, W)
        sample = (amount * (1 - down) * (1 - right) * in0)[:, None] * _gather(x, b, i0, c, here, H * W, C)
        sample += (amount * (1 - down) * right * in1)[:, None] * _gather(x, b, i1, c, here, H * W, C)
        sample += (amount * down * (1 - right) * in2)[:, None] * _gather(x, b, i2, c, here, H * W, C)
        sample += (amount * down * right * in3)[:, None] * _gather(x, b, i3, c, here, H * W, C)
        total += sample * tl.load(w + (b * K + k) * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (b * P + p)[:, None] * C + c[None, :], total.to(y.dtype.element_ty), mask=here)


@triton.jit
def _weight_offset_kernel(
    gy, x, w, offset, mask, gw, goffset, gmask, H, W, C, P, B, out_width, stride, padding, dilation,
    K: tl.constexpr, KW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each block of channels writes its own part of the offsets' and the mask's gradients, to be summed outside."""
    k = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1).to(tl.int64) * B + b
    weight = tl.load(w + (b * K + k) * C + c, mask=c < C, other=0.0).to(tl.float32)
    weight_gradient = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        here = (p < P)[:, None] & (c < C)[None, :]
        row, column = _sampling_points(offset, b, p, k, p < P, P, out_width, stride, padding, dilation, K, KW)
        top, left = tl.floor(row), tl.floor(column)
        down, right = row - top, column - left
        amount = tl.load(mask + (b * P + p) * K + k, mask=p < P, other=0.0).to(tl.float32) if mask is not None else 1.0
        upstream = tl.load(gy + (b * P + p)[:, None] * C + c[None, :], mask=here, other=0.0).to(tl.float32)
        weighted = upstream * weight[None, :]

        index, inside = _corner(top, left, 0, 0, H, W)
        pixels = _gather(x, b, index, c, here, H * W, C) * inside[:, None]
        dot0 = tl.sum(weighted * pixels, axis=1)
        sample = ((1 - down) * (1 - right))[:, None] * pixels
        index, inside = _corner(top, left, 0, 1, H, W)
        pixels = _gather(x, b, index, c, here, H * W, C) * inside[:, None]
        dot1 = tl.sum(weighted * pixels, axis=1)
        sample += ((1 - down) * right)[:, None] * pixels
        index, inside = _corner(top, left, 1, 0, H, W)
        pixels = _gather(x, b, index, c, here, H * W, C) * inside[:, None]
        dot2 = tl.sum(weighted * pixels, axis=1)
        sample += (down * (1 - right))[:, None] * pixels
        index, inside = _corner(top, left, 1, 1, H, W)
        pixels = _gather(x, b, index, c, here, H * W, C) * inside[:, None]
        dot3 = tl.sum(weighted * pixels, axis=1)
        sample += (down * right)[:, None] * pixels

        if mask is not None:
            sample = sample * amount[:, None]
            bilinear = (1 - down) * ((1 - right) * dot0 + right * dot1) + down * ((1 - right) * dot2 + right * dot3)
            tl.store(gmask + (part * P + p) * K + k, bilinear, mask=p < P)
        weight_gradient += tl.sum(upstream * sample, axis=0)
        if offset is not None:
            at = goffset + ((part * P + p) * K + k) * 2
            tl.store(at, amount * ((1 - right) * (dot2 - dot0) + right * (dot3 - dot1)), mask=p < P)
            tl.store(at + 1, amount * ((1 - down) * (dot1 - dot0) + down * (dot3 - dot2)), mask=p < P)
    tl.store(gw + (b * K + k) * C + c, weight_gradient, mask=c < C)


@triton.jit
def _input_kernel(
    gy, w, offset, mask, rows, gx, H, W, C, P, out_width, stride, padding, dilation, spans,
    K: tl.constexpr, KW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """rows: (B, K, spans, 2), first and last row that each block of positions samples at."""
    first_pixel = tl.program_id(0) * BLOCK_Q
    q = first_pixel + tl.arange(0, BLOCK_Q)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    first_row = (first_pixel // W).to(tl.float32)
    last_row = ((first_pixel + BLOCK_Q - 1) // W).to(tl.float32)
    pixel_row, pixel_column = (q // W).to(tl.float32), (q % W).to(tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for k in range(K):
        weight = tl.load(w + (b * K + k) * C + c, mask=c < C, other=0.0).to(tl.float32)
        for span in range(spans):
            sampled = rows + ((b * K + k) * spans + span) * 2
            if (tl.load(sampled) < last_row + 1) & (tl.load(sampled + 1) > first_row - 1):
                p = span * BLOCK_P + tl.arange(0, BLOCK_P)
                row, column = _sampling_points(offset, b, p, k, p < P, P, out_width, stride, padding, dilation, K, KW)
                hats = tl.maximum(1 - tl.abs(row[None, :] - pixel_row[:, None]), 0.0)
                hats *= tl.maximum(1 - tl.abs(column[None, :] - pixel_column[:, None]), 0.0)
                if mask is not None:
                    hats *= tl.load(mask + (b * P + p) * K + k, mask=p < P, other=0.0).to(tl.float32)[None, :]
                here = (p < P)[:, None] & (c < C)[None, :]
                upstream = tl.load(gy + (b * P + p)[:, None] * C + c[None, :], mask=here, other=0.0).to(tl.float32)
                weighted = (upstream * weight[None, :]).to(gy.dtype.element_ty)
                total += tl.dot(hats.to(gy.dtype.element_ty), weighted, input_precision="ieee")
    there = (q < H * W)[:, None] & (c < C)[None, :]
    tl.store(gx + (b * H * W + q)[:, None] * C + c[None, :], total.to(gx.dtype.element_ty), mask=there)


def forward(x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]) -> Tensor:
    """As `sampled_conv.kernel`."""
    g = _Geometry(x, weight, offset, mask, geometry)
    y = x.new_empty(g.batch, *g.out, g.channels)
    grid = (triton.cdiv(g.positions, _POSITIONS), g.channel_blocks, g.batch)
    inside = _inside(x, weight, offset, mask)
    _forward_kernel[grid](*inside, y, *g.sizes, **g.taps, BLOCK_P=_POSITIONS, BLOCK_C=_CHANNELS)
    return y.permute(0, 3, 1, 2)


def backward(
    gradient: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sampled_conv.kernel_backward`."""
    g = _Geometry(x, weight, offset, mask, geometry)
    gy, inside = pixels(gradient, x.dtype), _inside(x, weight, offset, mask)
    x_, w_, offset_, mask_ = inside
    gw = torch.empty_like(w_)
    parts = (g.channel_blocks, g.batch, g.positions, g.kernel)
    goffset = gw.new_empty(*parts, 2) if offset is not None else None
    gmask = gw.new_empty(parts) if mask is not None else None
    grid = (g.kernel, g.channel_blocks, g.batch)
    _weight_offset_kernel[grid](
        gy, *inside, gw, goffset, gmask, *g.sizes[:4], g.batch, *g.sizes[4:], **g.taps,
        BLOCK_P=_POSITIONS, BLOCK_C=_CHANNELS,
    )  # fmt: skip
    gx = torch.empty_like(x_)
    grid = (triton.cdiv(x_.shape[1] * x_.shape[2], _PIXELS), g.channel_blocks, g.batch)
    rows = _sampled_rows(offset_, g)
    _input_kernel[grid](
        gy, w_, offset_, mask_, rows, gx, *g.sizes, rows.shape[2], **g.taps,
        BLOCK_Q=_PIXELS, BLOCK_P=_HAT_POSITIONS, BLOCK_C=_CHANNELS,
    )  # fmt: skip
    return (
        map_back(gx, x),
        taps_back(gw, weight),
        map_back(goffset.sum(dim=0), offset) if offset is not None else x.new_empty(0),
        map_back(gmask.sum(dim=0), mask) if mask is not None else x.new_empty(0),
    )


class _Geometry:
    """The numbers that every kernel takes."""

    def __init__(self, x, weight, offset, mask, geometry) -> None:
        like = offset if offset is not None else mask
        self.device = x.device
        self.batch, self.channels, height, width = x.shape
        self.out = tuple(like.shape[2:])
        self.positions = self.out[0] * self.out[1]
        self.kernel = weight.shape[2] * weight.shape[3]
        self.channel_blocks = triton.cdiv(self.channels, _CHANNELS)
        self.sizes = (height, width, self.channels, self.positions, self.out[1], *geometry)
        self.taps = {"K": self.kernel, "KW": weight.shape[3]}
        self.stride, self.padding, self.dilation = geometry


def _inside(x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None) -> tuple:
    """The kernels' layout: x in its own type, everything else in float32."""
    exact = torch.float32
    return (
        pixels(x, x.dtype),
        taps(weight, exact),
        *(pixels(t, exact) if t is not None else None for t in (offset, mask)),
    )


def _sampled_rows(offset: Tensor | None, g: _Geometry) -> Tensor:
    """First and last row at which each tap's blocks of positions sample: (B, K, spans, 2) float32."""
    device = offset.device if offset is not None else g.device
    positions, taps_ = torch.arange(g.positions, device=device), torch.arange(g.kernel, device=device)
    rows = (positions // g.out[1] * g.stride - g.padding)[:, None] + taps_ // g.taps["KW"] * g.dilation  # (P, K)
    rows = rows.to(torch.float32).expand(g.batch, -1, -1)
    if offset is not None:
        rows = rows + offset.view(g.batch, g.positions, g.kernel, 2)[..., 0]
    spans = triton.cdiv(g.positions, _HAT_POSITIONS)
    missing = spans * _HAT_POSITIONS - g.positions
    blocks = torch.cat([rows, rows[:, -1:].expand(-1, missing, -1)], dim=1).unflatten(1, (spans, _HAT_POSITIONS))
    return torch.stack([blocks.amin(dim=2), blocks.amax(dim=2)], dim=-1).transpose(1, 2).contiguous()

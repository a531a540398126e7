"""The depthwise convolution on a GPU, in Triton: channels innermost, sums in float32, the same bits every time.

cuDNN's takes twice the forward's time for the gradient of the input, and turns float32 maps of 98 channels, the
offset generators', into channels first and back, layer by layer (docs/kernels.md).

Two kernels. The first, forward and with flipped taps the gradient of x, makes ROWS rows of y at a time: a pixel of x
is loaded once for each column of the kernel, and serves all rows of y that it reaches. The second, the gradient of w,
walks over the map for one column of the kernel; each group of blocks has a part of its own, to be summed outside.

Images and columns of the map are one axis, so that narrow maps fill a block, too.

Shapes: x (B, H, W, C), w (K, C), y (B, Ho, Wo, C); stride and dilation are 1.
"""

# ruff: noqa: RUF005, SIM108 - Triton's language has no unpacking into a tuple, and compiles both arms of a ternary
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from contextual_cnn.ops.memory_format import pixels

# Programs that share the gradient of w: enough for every multiprocessor of a large card, several times
PROGRAMS = 2048


@dataclass(frozen=True)
class Blocks:
    """What one program works on: rows and columns of y, channels; and the warps it has."""

    rows: int = 7
    columns: int = 16
    channels: int = 64
    warps: int = 4


# The fastest of those that scripts/dev/tune_kernels.py tried on an H100 (docs/kernels.md)
FORWARD, FORWARD_4 = Blocks(), Blocks(rows=4)  # the latter where it leaves no row unused
WEIGHT = Blocks(columns=32, channels=32)


@triton.jit
def _places(block: tl.tensor, B: tl.tensor, WO: tl.tensor, BLOCK: tl.constexpr) -> tl.tuple:
    """Image, column, and whether there is such an image, for a block of the axis of both."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    return (place // WO).to(tl.int64), place % WO, place < B * WO


@triton.jit
def _row(
    tensor: tl.tensor, row: tl.tensor, here: tl.tensor, c: tl.tensor,
    H: tl.tensor, W: tl.tensor, C: tl.tensor, WHOLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A row of the map, as float32, zero outside of it. WHOLE: every channel of the block exists."""
    mask = (here & (row >= 0) & (row < H))[:, None]
    mask = mask if WHOLE else mask & (c < C)[None, :]
    return tl.load(tensor + row * W * C, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x: tl.tensor, w: tl.tensor, bias: tl.tensor | None, y: tl.tensor,
    B: tl.tensor, H: tl.tensor, W: tl.tensor, C: tl.tensor, HO: tl.tensor, WO: tl.tensor,
    pad_rows: tl.tensor, pad_columns: tl.tensor,
    KH: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    image, column, exists = _places(tl.program_id(1), B, WO, BLOCK_Q)
    first_row = tl.program_id(2) * ROWS
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums: tl.tuple = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_Q, BLOCK_C), tl.float32),)
    for dx in range(KW):
        at = column + dx - pad_columns
        here = exists & (at >= 0) & (at < W)
        pointers = x + (image * H * W * C + at * C)[:, None] + c[None, :]
        weights: tl.tuple = ()
        for dy in tl.static_range(KH):
            tap = KH * KW - 1 - dy * KW - dx if FLIP else dy * KW + dx
            weights = weights + (tl.load(w + tap * C + c, mask=c < C, other=0.0)[None, :],)
        for i in tl.static_range(ROWS + KH - 1):
            tile = _row(pointers, first_row + i - pad_rows, here, c, H, W, C, WHOLE)
            more: tl.tuple = ()
            for r in tl.static_range(ROWS):
                if i - r >= 0 and i - r < KH:
                    more = more + (sums[r] + tile * weights[i - r],)
                else:
                    more = more + (sums[r],)
            sums = more
    outputs = y + (image * HO * WO * C + column * C)[:, None] + c[None, :]
    for r in tl.static_range(ROWS):
        row = first_row + r
        total = sums[r]
        if bias is not None:
            total += tl.load(bias + c, mask=c < C, other=0.0)[None, :]
        mask = (exists & (row < HO))[:, None] & (c < C)[None, :]
        tl.store(outputs + row * WO * C, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _weight_kernel(
    gy: tl.tensor, x: tl.tensor, parts: tl.tensor,
    B: tl.tensor, H: tl.tensor, W: tl.tensor, C: tl.tensor, HO: tl.tensor, WO: tl.tensor,
    pad_rows: tl.tensor, pad_columns: tl.tensor, blocks: tl.tensor, blocks_each: tl.tensor,
    KH: tl.constexpr, KW: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """parts: (groups, K, C). blocks: how many there are, of ROWS rows and BLOCK_Q columns."""
    dx, group = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_blocks = tl.cdiv(HO, ROWS)
    sums: tl.tuple = ()
    for _ in tl.static_range(KH):
        sums = sums + (tl.zeros((BLOCK_Q, BLOCK_C), tl.float32),)
    for block in range(group * blocks_each, tl.minimum((group + 1) * blocks_each, blocks)):
        image, column, exists = _places(block // row_blocks, B, WO, BLOCK_Q)
        first_row = block % row_blocks * ROWS
        at = column + dx - pad_columns
        upstreams = gy + (image * HO * WO * C + column * C)[:, None] + c[None, :]
        pointers = x + (image * H * W * C + at * C)[:, None] + c[None, :]
        here = exists & (at >= 0) & (at < W)
        upstream: tl.tuple = ()
        for r in tl.static_range(ROWS):
            upstream = upstream + (_row(upstreams, first_row + r, exists, c, HO, WO, C, WHOLE),)
        for i in tl.static_range(ROWS + KH - 1):
            tile = _row(pointers, first_row + i - pad_rows, here, c, H, W, C, WHOLE)
            more: tl.tuple = ()
            for dy in tl.static_range(KH):
                if i - dy >= 0 and i - dy < ROWS:
                    more = more + (sums[dy] + tile * upstream[i - dy],)
                else:
                    more = more + (sums[dy],)
            sums = more
    for dy in tl.static_range(KH):
        entry = (group * KH * KW + dy * KW + dx) * C + c
        tl.store(parts + entry, tl.sum(sums[dy], axis=0), mask=c < C)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dtype: torch.dtype) -> Tensor:
    """As `depthwise_conv.kernel`."""
    return _correlate(pixels(x, x.dtype), _taps(weight), bias, weight.shape[2:], (padding, padding), dtype, flip=False)


def input_gradient(gradient: Tensor, weight: Tensor, padding: int, dtype: torch.dtype) -> Tensor:
    """The gradient of x: the upstream gradient's correlation with the flipped taps."""
    kernel = weight.shape[2:]
    pads = (kernel[0] - 1 - padding, kernel[1] - 1 - padding)
    return _correlate(pixels(gradient, gradient.dtype), _taps(weight), None, kernel, pads, dtype, flip=True)


def weight_gradient(gradient: Tensor, x: Tensor, kernel: Sequence[int], padding: int) -> Tensor:
    """The gradient of the (C, 1, kh, kw) weight, float32."""
    gy, inside = pixels(gradient, gradient.dtype), pixels(x, x.dtype)
    (batch, *out, channels), (height, width) = gy.shape, inside.shape[1:3]
    b = _narrowed(WEIGHT, channels)
    blocks = triton.cdiv(batch * out[1], b.columns) * triton.cdiv(out[0], b.rows)
    columns = kernel[1] * triton.cdiv(channels, b.channels)
    blocks_each = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // columns)))
    groups = triton.cdiv(blocks, blocks_each)
    parts = torch.empty(groups, kernel[0] * kernel[1], channels, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_kernel[(kernel[1], triton.cdiv(channels, b.channels), groups)](
            gy, inside, parts, batch, height, width, channels, *out, padding, padding, blocks, blocks_each,
            KH=kernel[0], KW=kernel[1], WHOLE=channels % b.channels == 0,
            ROWS=b.rows, BLOCK_Q=b.columns, BLOCK_C=b.channels, num_warps=b.warps,
        )  # fmt: skip
    return parts.sum(dim=0).t().reshape(channels, 1, *kernel)


def _correlate(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    pads: tuple[int, int],
    dtype: torch.dtype,
    *,
    flip: bool,
) -> Tensor:
    batch, height, width, channels = x.shape
    out = (height + 2 * pads[0] - kernel[0] + 1, width + 2 * pads[1] - kernel[1] + 1)
    y = x.new_empty(batch, *out, channels, dtype=dtype)
    b = _narrowed(FORWARD_4 if out[0] % 4 == 0 and channels % 16 == 0 else FORWARD, channels)
    grid = (triton.cdiv(channels, b.channels), triton.cdiv(batch * out[1], b.columns), triton.cdiv(out[0], b.rows))
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        _forward_kernel[grid](
            x, taps, bias, y, batch, height, width, channels, *out, *pads,
            KH=kernel[0], KW=kernel[1], FLIP=flip, WHOLE=channels % b.channels == 0,
            ROWS=b.rows, BLOCK_Q=b.columns, BLOCK_C=b.channels, num_warps=b.warps,
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)


def _narrowed(blocks: Blocks, channels: int) -> Blocks:
    """Half the channels and twice the columns where that leaves fewer channels of the last block unused."""
    half = blocks.channels // 2
    if -(-channels // half) * half == -(-channels // blocks.channels) * blocks.channels:
        return blocks
    return Blocks(blocks.rows, 2 * blocks.columns, half, blocks.warps)


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, kh, kw) -> (K, C) float32."""
    return weight.flatten(1).t().float().contiguous()

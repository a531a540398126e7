"""The sampled convolution on a GPU, in Triton: no buffer of sampled taps, no atomics, hence the same bits every time.

Three kernels do the work, all with channels innermost (channels_last):

* forward: a block of positions walks through the taps, four gathered pixels each;
* gradients of weights, offsets and mask: a tap walks through the positions;
* gradient of x: a block of pixels collects from all sampling points near it. Bilinear interpolation is a product of
  two hats, max(0, 1 - |distance|), so what the points of a tap give to the pixels is a matrix of hats times the
  upstream gradient: work for the tensor cores. Blocks of points whose rows cannot reach the pixels are left out.

Two more come first in the backward pass: offsets and masks are turned tap by tap, and for each block of pixels the
blocks of points that it needs are listed, so that the loop over them can load ahead.

Where a tap samples is the same for all channels, and working it out costs more than a channel's arithmetic. So a
program serves several chunks of channels with one set of positions; a tuple holds a chunk's sum each.

The hat is right for the gradient of x only: at whole pixels it has no one-sided slope (see sampled_conv_torch.py),
so the offsets' gradient uses the floor form.

Shapes: x (B, H, W, C), w (B, K, C), offset (B, P, K, 2), mask (B, P, K), y (B, P, C); P = Ho Wo positions,
Q = H W pixels.
"""

# ruff: noqa: RUF005 - Triton's language has no unpacking into a tuple
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contextual_cnn.ops.memory_format import map_back, output_shape, pixels, taps, taps_back


@dataclass(frozen=True)
class Blocks:
    """What one program works on.

    positions, points: positions at a time, `points` in a matrix of hats. channels: in a block. chunks: blocks of
    channels that a program serves, at most. pixels: in a matrix of hats. stages: in which loads run ahead.
    """

    positions: int = 16
    channels: int = 64
    chunks: int = 3
    warps: int = 4
    pixels: int = 64
    points: int = 32
    stages: int = 3


# By scripts/dev/tune_kernels.py on an H100 (docs/kernels.md); FORWARD has been timed with these alone
FORWARD = Blocks()
WEIGHT_OFFSET = Blocks(warps=2)
INPUT = Blocks()
# Of float32 maps: a number takes a register, and a matrix of hats as many as there are for one chunk
WEIGHT_OFFSET_EXACT = replace(WEIGHT_OFFSET, warps=4)
INPUT_EXACT = replace(INPUT, chunks=1)


@triton.jit
def _regular_points(p: tl.tensor, out_width: tl.tensor, stride: tl.tensor, padding: tl.tensor) -> tl.tuple:
    """Row and column, in pixels, of the first tap of the positions p, without offsets."""
    # An integer division by a number that is not known when it is compiled takes forty instructions; half a position
    # more keeps the product clear of whole rows, for maps of up to a million positions
    row = tl.floor((p.to(tl.float32) + 0.5) * (1.0 / out_width))
    column = p.to(tl.float32) - row * out_width
    return row * stride - padding, column * stride - padding


@triton.jit
def _regular_taps(
    row: tl.tensor, column: tl.tensor, k: tl.tensor, dilation: tl.tensor, KW: tl.constexpr
) -> tl.tuple:  # fmt: skip
    """From the first tap to tap k, without offsets."""
    return row + (k // KW * dilation).to(tl.float32), column + (k % KW * dilation).to(tl.float32)


@triton.jit
def _tap_points(
    row: tl.tensor, column: tl.tensor, offset: tl.tensor | None, p: tl.tensor, length: tl.tensor,
    k: tl.tensor, dilation: tl.tensor, KW: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Row and column at which tap k samples for the positions p; offset: (K, 2, length), one sample's."""
    row, column = _regular_taps(row, column, k, dilation, KW)
    if offset is not None:
        row += tl.load(offset + 2 * k * length + p)
        column += tl.load(offset + (2 * k + 1) * length + p)
    return row, column


@triton.jit
def _corners(row: tl.tensor, column: tl.tensor, amount: tl.tensor, H: tl.tensor, W: tl.tensor) -> tl.tuple:
    """The four pixels around a sampling point.

    Returns:
        Their indices on the map; 1 for one on the map, 0 (and index 0) for one that is not; their bilinear weights
        times amount; and how far down and right of the first one the point lies.
    """
    top, left = tl.floor(row), tl.floor(column)
    down, right = row - top, column - left
    indices: tl.tuple = ()
    insides: tl.tuple = ()
    weights: tl.tuple = ()
    for i in tl.static_range(4):
        at_row, at_column = top + i // 2, left + i % 2
        inside = (at_row >= 0) & (at_row < H) & (at_column >= 0) & (at_column < W)
        by_row, by_column = down if i // 2 else 1 - down, right if i % 2 else 1 - right
        indices = indices + (tl.where(inside, at_row * W + at_column, 0.0).to(tl.int32),)
        insides = insides + (inside.to(tl.float32),)
        weights = weights + (amount * by_row * by_column * inside.to(tl.float32),)
    return indices, insides, weights, down, right


@triton.jit
def _rows(tensor: tl.tensor, indices: tl.tuple, c: tl.tensor, C: tl.tensor) -> tl.tuple:
    """Pointers to the channels c of four rows each; a chunk further is a constant further, free of arithmetic."""
    pointers: tl.tuple = ()
    for i in tl.static_range(4):
        pointers = pointers + (tensor + (indices[i] * C)[:, None] + c[None, :],)
    return pointers


@triton.jit
def _load(pointers: tl.tensor, c: tl.tensor, C: tl.tensor, WHOLE: tl.constexpr) -> tl.tensor:
    """As float32. WHOLE: there are no channels beyond C to leave out."""
    return (tl.load(pointers) if WHOLE else tl.load(pointers, mask=(c < C)[None, :], other=0.0)).to(tl.float32)


@triton.jit
def _zeros(CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tuple:
    zeros: tl.tuple = ()
    for _ in tl.static_range(CHUNKS):
        zeros = zeros + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return zeros


@triton.jit
def _forward_kernel(
    x: tl.tensor, w: tl.tensor, offset: tl.tensor | None, mask: tl.tensor | None, y: tl.tensor,
    H: tl.tensor, W: tl.tensor, C: tl.tensor, P: tl.tensor, out_width: tl.tensor,
    stride: tl.tensor, padding: tl.tensor, dilation: tl.tensor,
    K: tl.constexpr, KW: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """Offsets and mask as they come, (P, K, 2) and (P, K) of a sample: the next taps' are close by in memory."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    x, w, y = x + b * H * W * C, w + b * K * C, y + b * P * C
    offset = offset + b * P * K * 2 if offset is not None else None
    mask = mask + b * P * K if mask is not None else None
    first_row, first_column = _regular_points(p, out_width, stride, padding)
    totals = _zeros(CHUNKS, BLOCK_P, BLOCK_C)
    for k in range(K):
        row, column = _regular_taps(first_row, first_column, k, dilation, KW)
        entry = p * K + k
        if offset is not None:
            row += tl.load(offset + entry * 2, mask=p < P, other=0.0)
            column += tl.load(offset + entry * 2 + 1, mask=p < P, other=0.0)
        amount = tl.load(mask + entry, mask=p < P, other=0.0) if mask is not None else 1.0
        indices, _, weights, _, _ = _corners(row, column, amount, H, W)
        corners = _rows(x, indices, first, C)
        more: tl.tuple = ()
        for chunk in tl.static_range(CHUNKS):
            c = first + chunk * BLOCK_C
            sample = weights[0][:, None] * _load(corners[0] + chunk * BLOCK_C, c, C, WHOLE)
            for i in tl.static_range(1, 4):
                sample += weights[i][:, None] * _load(corners[i] + chunk * BLOCK_C, c, C, WHOLE)
            more = more + (totals[chunk] + sample * tl.load(w + k * C + c, mask=c < C, other=0.0)[None, :],)
        totals = more
    for chunk in tl.static_range(CHUNKS):
        c = first + chunk * BLOCK_C
        here = (p < P)[:, None] & (c < C)[None, :]
        tl.store(y + (p * C)[:, None] + c[None, :], totals[chunk].to(y.dtype.element_ty), mask=here)


@triton.jit
def _weight_offset_kernel(
    gy: tl.tensor, x: tl.tensor, w: tl.tensor, offset: tl.tensor | None, mask: tl.tensor | None,
    gw: tl.tensor, goffset: tl.tensor | None, gmask: tl.tensor | None,
    H: tl.tensor, W: tl.tensor, C: tl.tensor, P: tl.tensor, out_width: tl.tensor,
    stride: tl.tensor, padding: tl.tensor, dilation: tl.tensor, B: tl.tensor, length: tl.tensor,
    K: tl.constexpr, KW: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """Each group of channels writes its own part of the offsets' and the mask's gradients, to be summed outside."""
    k = tl.program_id(0)
    first = tl.program_id(1) * CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    part = (tl.program_id(1).to(tl.int64) * B + b) * P * K
    gy, x, w, gw = gy + b * P * C, x + b * H * W * C, w + (b * K + k) * C, gw + (b * K + k) * C
    offset = offset + b * K * 2 * length if offset is not None else None
    mask = mask + b * K * length if mask is not None else None
    sums = _zeros(CHUNKS, BLOCK_P, BLOCK_C)
    for first_position in range(0, P, BLOCK_P):
        p = first_position + tl.arange(0, BLOCK_P)
        row, column = _regular_points(p, out_width, stride, padding)
        row, column = _tap_points(row, column, offset, p, length, k, dilation, KW)
        amount = tl.load(mask + k * length + p) if mask is not None else 1.0
        indices, insides, weights, down, right = _corners(row, column, amount, H, W)
        corners = _rows(x, indices, first, C)
        # Products of the upstream gradient with each corner, added up over the channels last of all
        products = _zeros(4, BLOCK_P, BLOCK_C)
        more: tl.tuple = ()
        for chunk in tl.static_range(CHUNKS):
            c = first + chunk * BLOCK_C
            here = (p < P)[:, None] if WHOLE else (p < P)[:, None] & (c < C)[None, :]
            upstream = tl.load(gy + (p * C)[:, None] + c[None, :], mask=here, other=0.0).to(tl.float32)
            weighted = upstream * tl.load(w + c, mask=c < C, other=0.0)[None, :]
            sample = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            more_products: tl.tuple = ()
            for i in tl.static_range(4):
                corner = _load(corners[i] + chunk * BLOCK_C, c, C, WHOLE)
                more_products = more_products + (products[i] + weighted * corner,)
                sample += weights[i][:, None] * corner
            products = more_products
            more = more + (sums[chunk] + upstream * sample,)
        sums = more
        dot0, dot1 = insides[0] * tl.sum(products[0], axis=1), insides[1] * tl.sum(products[1], axis=1)
        dot2, dot3 = insides[2] * tl.sum(products[2], axis=1), insides[3] * tl.sum(products[3], axis=1)
        entry = part + p * K + k
        if mask is not None:
            bilinear = (1 - down) * ((1 - right) * dot0 + right * dot1) + down * ((1 - right) * dot2 + right * dot3)
            tl.store(gmask + entry, bilinear, mask=p < P)
        if offset is not None:
            by_row = amount * ((1 - right) * (dot2 - dot0) + right * (dot3 - dot1))
            by_column = amount * ((1 - down) * (dot1 - dot0) + down * (dot3 - dot2))
            tl.store(goffset + entry * 2, by_row, mask=p < P)
            tl.store(goffset + entry * 2 + 1, by_column, mask=p < P)
    for chunk in tl.static_range(CHUNKS):
        c = first + chunk * BLOCK_C
        tl.store(gw + c, tl.sum(sums[chunk], axis=0), mask=c < C)


@triton.jit
def _hats(distance: tl.tensor) -> tl.tensor:
    """max(0, 1 - |distance|); NaN stays NaN."""
    return tl.maximum(1 - tl.abs(distance), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _arrange_kernel(
    offset: tl.tensor | None, mask: tl.tensor | None, arranged: tl.tensor | None, amounts: tl.tensor | None,
    rows: tl.tensor,
    P: tl.tensor, length: tl.tensor, spans: tl.tensor, out_width: tl.tensor,
    stride: tl.tensor, padding: tl.tensor, dilation: tl.tensor,
    K: tl.constexpr, KW: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
) -> None:  # fmt: skip
    """Offsets and mask by taps, zero behind the last position; and the rows that a tap's blocks of positions sample at.

    offset (B, P, K, 2) -> arranged (B, K, 2, length); mask (B, P, K) -> amounts (B, K, length); rows (B, 2, K, spans).
    """
    span = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    p = span * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    here = (p < P)[:, None] & (k < K)[None, :]
    row, _ = _regular_points(p, out_width, stride, padding)
    row = row[:, None] + (k // KW * dilation).to(tl.float32)[None, :]
    if offset is not None:
        entries = offset + b * P * K * 2 + (p * K * 2)[:, None] + (k * 2)[None, :]
        places = arranged + b * K * 2 * length + (k * 2 * length)[None, :] + p[:, None]
        by_row, by_column = tl.load(entries, mask=here, other=0.0), tl.load(entries + 1, mask=here, other=0.0)
        tl.store(places, by_row, mask=(k < K)[None, :])
        tl.store(places + length, by_column, mask=(k < K)[None, :])
        row += by_row
    if mask is not None:
        amount = tl.load(mask + b * P * K + (p * K)[:, None] + k[None, :], mask=here, other=0.0)
        tl.store(amounts + b * K * length + (k * length)[None, :] + p[:, None], amount, mask=(k < K)[None, :])
    # A row that is NaN is anywhere
    infinity = float("inf")
    first = tl.min(tl.where(here, tl.where(row == row, row, -infinity), infinity), axis=0)
    last = tl.max(tl.where(here, tl.where(row == row, row, infinity), -infinity), axis=0)
    entry = rows + b * 2 * K * spans + k * spans + span
    tl.store(entry, first, mask=k < K)
    tl.store(entry + K * spans, last, mask=k < K)


@triton.jit
def _visit_kernel(
    rows: tl.tensor, visits: tl.tensor, counts: tl.tensor, W: tl.tensor, spans: tl.tensor,
    K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr,
) -> None:  # fmt: skip
    """The taps' blocks of positions that can reach a block of pixels, each as tap * 65536 + block.

    visits (B, blocks of pixels, K * spans), of which the first counts (B, blocks of pixels) are.
    """
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    there = e < K * spans
    first_row = (block * BLOCK_Q // W).to(tl.float32)
    last_row = ((block * BLOCK_Q + BLOCK_Q - 1) // W).to(tl.float32)
    rows += b * 2 * K * spans
    first, last = tl.load(rows + e, mask=there, other=0.0), tl.load(rows + K * spans + e, mask=there, other=0.0)
    reach = (there & (first < last_row + 1) & (last > first_row - 1)).to(tl.int32)
    own = b * tl.num_programs(0) + block
    tl.store(visits + own * K * spans + tl.cumsum(reach, 0) - 1, e // spans * 65536 + e % spans, mask=reach > 0)
    tl.store(counts + own, tl.sum(reach, axis=0))


@triton.jit
def _input_kernel(
    gy: tl.tensor, w: tl.tensor, offset: tl.tensor | None, mask: tl.tensor | None,
    visits: tl.tensor, counts: tl.tensor, gx: tl.tensor,
    H: tl.tensor, W: tl.tensor, C: tl.tensor, P: tl.tensor, out_width: tl.tensor,
    stride: tl.tensor, padding: tl.tensor, dilation: tl.tensor, length: tl.tensor, spans: tl.tensor,
    K: tl.constexpr, KW: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """visits, counts: as `_visit_kernel` lists them."""
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = tl.program_id(1) * CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    gy, w, gx = gy + b * P * C, w + b * K * C, gx + b * H * W * C
    offset = offset + b * K * 2 * length if offset is not None else None
    mask = mask + b * K * length if mask is not None else None
    own = b * tl.num_programs(0) + tl.program_id(0)
    visits += own * K * spans
    pixel_row, pixel_column = (q // W).to(tl.float32), (q % W).to(tl.float32)
    totals = _zeros(CHUNKS, BLOCK_Q, BLOCK_C)
    for n in range(tl.load(counts + own)):
        visit = tl.load(visits + n)
        k = visit // 65536
        p = visit % 65536 * BLOCK_P + tl.arange(0, BLOCK_P)
        row, column = _regular_points(p, out_width, stride, padding)
        row, column = _tap_points(row, column, offset, p, length, k, dilation, KW)
        hats = _hats(row[None, :] - pixel_row[:, None]) * _hats(column[None, :] - pixel_column[:, None])
        if mask is not None:
            hats *= tl.load(mask + k * length + p)[None, :]
        hats = hats.to(gy.dtype.element_ty)
        more: tl.tuple = ()
        for chunk in tl.static_range(CHUNKS):
            c = first + chunk * BLOCK_C
            here = (p < P)[:, None] if WHOLE else (p < P)[:, None] & (c < C)[None, :]
            upstream = tl.load(gy + (p * C)[:, None] + c[None, :], mask=here, other=0.0)
            weight = tl.load(w + k * C + c, mask=c < C, other=0.0)[None, :]
            # Weighted behind the product, in float32: what goes into it is rounded to gy's type
            product = tl.dot(hats, upstream, input_precision="ieee")
            more = more + (totals[chunk] + product * weight,)
        totals = more
    for chunk in tl.static_range(CHUNKS):
        c = first + chunk * BLOCK_C
        there = (q < H * W)[:, None] & (c < C)[None, :]
        tl.store(gx + (q * C)[:, None] + c[None, :], totals[chunk].to(gx.dtype.element_ty), mask=there)


def forward(x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]) -> Tensor:
    """As `sampled_conv.kernel`."""
    g = _Geometry(x, weight, offset, mask, geometry)
    y = x.new_empty(g.batch, *g.out, g.channels)
    groups, constants = g.channel_groups(FORWARD)
    inside = pixels(x, x.dtype), taps(weight, torch.float32), *_exact(offset, mask)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        _forward_kernel[(triton.cdiv(g.positions, FORWARD.positions), groups, g.batch)](
            *inside, y, *g.sizes, **constants, BLOCK_P=FORWARD.positions, num_warps=FORWARD.warps
        )
    return y.permute(0, 3, 1, 2)


def backward(
    gradient: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sampled_conv.kernel_backward`."""
    g = _Geometry(x, weight, offset, mask, geometry)
    gy, inside, w = pixels(gradient, x.dtype), pixels(x, x.dtype), taps(weight, torch.float32)
    with torch.cuda.device_of(x):
        points = _arranged(offset, mask, g)
        gw, goffset, gmask = _weight_offset_gradients(g, gy, inside, w, points)
        gx = _input_gradient(g, gy, inside, w, points)
    return (
        map_back(gx, x),
        taps_back(gw, weight),
        _sum(goffset, offset, x),
        _sum(gmask, mask, x),
    )


def _sum(parts: Tensor | None, like: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of an offset or a mask, from each group's part; an empty one of what is not there."""
    if parts is None or like is None:
        return x.new_empty(0)
    return map_back(parts.sum(dim=0) if len(parts) > 1 else parts[0], like)


def _weight_offset_gradients(
    g: "_Geometry", gy: Tensor, x: Tensor, w: Tensor, points: "_Points"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of w; and of offset and mask in parts, one for each group of channels."""
    block = WEIGHT_OFFSET if x.element_size() == 2 else WEIGHT_OFFSET_EXACT
    groups, constants = g.channel_groups(block)
    gw, parts = torch.empty_like(w), (groups, g.batch, g.positions, g.kernel)
    goffset = gw.new_empty(*parts, 2) if points.offset is not None else None
    gmask = gw.new_empty(parts) if points.mask is not None else None
    _weight_offset_kernel[(g.kernel, groups, g.batch)](
        gy, x, w, points.offset, points.mask, gw, goffset, gmask, *g.sizes, g.batch, g.length, **constants,
        BLOCK_P=block.positions, num_warps=block.warps,
    )  # fmt: skip
    return gw, goffset, gmask


def _input_gradient(g: "_Geometry", gy: Tensor, x: Tensor, w: Tensor, points: "_Points") -> Tensor:
    block = INPUT if x.element_size() == 2 else INPUT_EXACT
    gx, count = torch.empty_like(x), triton.cdiv(x.shape[1] * x.shape[2], block.pixels)
    entries = g.kernel * g.spans
    visits = torch.empty(g.batch, count, entries, device=g.device, dtype=torch.int32)
    counts = torch.empty(g.batch, count, device=g.device, dtype=torch.int32)
    _visit_kernel[(count, g.batch)](
        points.rows, visits, counts, x.shape[2], g.spans,
        K=g.kernel, BLOCK_Q=block.pixels, BLOCK_E=triton.next_power_of_2(entries),
    )  # fmt: skip
    groups, constants = g.channel_groups(block)
    _input_kernel[(count, groups, g.batch)](
        gy, w, points.offset, points.mask, visits, counts, gx, *g.sizes, g.length, g.spans, **constants,
        BLOCK_Q=block.pixels, BLOCK_P=block.points, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return gx


class _Geometry:
    """The numbers that every kernel takes."""

    def __init__(
        self, x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]
    ) -> None:
        self.device = x.device
        self.batch, self.channels, height, width = x.shape
        self.out = tuple(output_shape(offset, mask))
        self.positions = self.out[0] * self.out[1]
        self.spans = triton.cdiv(self.positions, INPUT.points)
        self.kernel, self.kernel_width = weight.shape[2] * weight.shape[3], weight.shape[3]
        self.length = self.spans * INPUT.points
        self.geometry = tuple(geometry)
        self.sizes = (height, width, self.channels, self.positions, self.out[1], *geometry)

    def channel_groups(self, block: Blocks) -> tuple[int, dict]:
        """How many programs share the channels, and the constants that follow."""
        blocks = triton.cdiv(self.channels, block.channels)
        chunks = min(blocks, block.chunks)
        constants = {
            "K": self.kernel,
            "KW": self.kernel_width,
            "CHUNKS": chunks,
            "WHOLE": self.channels % (chunks * block.channels) == 0,
            "BLOCK_C": block.channels,
        }
        return triton.cdiv(blocks, chunks), constants


def _exact(*maps: Tensor | None) -> list[Tensor | None]:
    """(B, maps, Ho, Wo) -> (B, Ho, Wo, maps) float32, of what is there."""
    return [pixels(t, torch.float32) if t is not None else None for t in maps]


class _Points(NamedTuple):
    """Where and how much each tap samples, float32, in whole spans of positions.

    offset (B, K, 2, length) in pixels; mask (B, K, length); rows (B, 2, K, spans), first and last of a span.
    """

    offset: Tensor | None
    mask: Tensor | None
    rows: Tensor


def _arranged(offset: Tensor | None, mask: Tensor | None, g: _Geometry) -> _Points:
    """By taps, so that neighbouring threads read neighbouring numbers."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(g.batch, *shape, device=g.device, dtype=torch.float32)

    points = _Points(
        empty(g.kernel, 2, g.length) if offset is not None else None,
        empty(g.kernel, g.length) if mask is not None else None,
        empty(2, g.kernel, g.spans),
    )
    _arrange_kernel[(g.spans, g.batch)](
        *_exact(offset, mask), *points, g.positions, g.length, g.spans, g.out[1], *g.geometry,
        K=g.kernel, KW=g.kernel_width, BLOCK_K=triton.next_power_of_2(g.kernel), BLOCK_P=INPUT.points, num_warps=8,
    )  # fmt: skip
    return points

"""The sampled convolution on a GPU, in Triton: no buffer of sampled taps, no atomics, hence the same bits every time.

Three kernels, all with channels innermost (channels_last):

* forward: a block of positions walks through the taps, four gathered pixels each;
* gradients of weights, offsets and mask: a tap walks through the positions;
* gradient of x: a block of pixels collects from all sampling points near it. Bilinear interpolation is a product of
  two hats, max(0, 1 - |distance|), so what the points of a tap give to the pixels is a matrix of hats times the
  upstream gradient: work for the tensor cores. Blocks of points whose rows cannot reach the pixels are skipped.

Where a tap samples is the same for all channels, and working it out costs more than a channel's arithmetic. So a
program serves several chunks of channels with one set of positions; a tuple holds a chunk's sum each.

The hat is right for the gradient of x only: at whole pixels it has no one-sided slope (see sampled_conv_torch.py),
so the offsets' gradient uses the floor form.

Shapes: x (B, H, W, C), w (B, K, C), offset (B, P, K, 2), mask (B, P, K), y (B, P, C); P = Ho Wo positions,
Q = H W pixels.
"""

# ruff: noqa: RUF005 - Triton's language has no unpacking into a tuple
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from contextual_cnn.ops.memory_format import map_back, output_shape, pixels, taps, taps_back


@dataclass(frozen=True)
class Blocks:
    """What one program works on. Not timed yet: chosen for no register spills on sm_90 (scripts/dev/tune_kernels.py).

    positions, channels: of a block in the first two kernels. chunks: blocks of channels a program serves, at most.
    pixels, points: of a matrix of hats. warps: of the first two kernels. hat_warps: of the third.
    """

    positions: int = 16
    channels: int = 64
    chunks: int = 3
    warps: int = 4
    pixels: int = 64
    points: int = 64
    hat_warps: int = 8


BLOCKS = Blocks()


@triton.jit
def _regular_points(p: tl.tensor, out_width: tl.tensor, stride: tl.tensor, padding: tl.tensor) -> tl.tuple:
    """Row and column, in pixels, of the first tap of the positions p, without offsets."""
    # An integer division by a number that is not known when it is compiled takes forty instructions; half a position
    # more keeps the product clear of whole rows, for maps of up to a million positions
    row = tl.floor((p.to(tl.float32) + 0.5) * (1.0 / out_width))
    column = p.to(tl.float32) - row * out_width
    return row * stride - padding, column * stride - padding


@triton.jit
def _tap_points(
    row: tl.tensor, column: tl.tensor, offset: tl.tensor | None, entry: tl.tensor,
    in_range: tl.tensor, k: tl.tensor, dilation: tl.tensor, KW: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Row and column at which tap k samples; entry: index of (position, tap) within the sample."""
    row += (k // KW * dilation).to(tl.float32)
    column += (k % KW * dilation).to(tl.float32)
    if offset is not None:
        row += tl.load(offset + entry * 2, mask=in_range, other=0.0)
        column += tl.load(offset + entry * 2 + 1, mask=in_range, other=0.0)
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
    H: tl.tensor, W: tl.tensor, C: tl.tensor, P: tl.tensor, out_width: tl.tensor, stride: tl.tensor, padding: tl.tensor,
    dilation: tl.tensor,
    K: tl.constexpr, KW: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    x, w, y = x + b * H * W * C, w + b * K * C, y + b * P * C
    offset = offset + b * P * K * 2 if offset is not None else None
    mask = mask + b * P * K if mask is not None else None
    first_row, first_column = _regular_points(p, out_width, stride, padding)
    totals = _zeros(CHUNKS, BLOCK_P, BLOCK_C)
    for k in range(K):
        row, column = _tap_points(first_row, first_column, offset, p * K + k, p < P, k, dilation, KW)
        amount = tl.load(mask + p * K + k, mask=p < P, other=0.0) if mask is not None else 1.0
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
    H: tl.tensor, W: tl.tensor, C: tl.tensor, P: tl.tensor, B: tl.tensor, out_width: tl.tensor,
    stride: tl.tensor, padding: tl.tensor, dilation: tl.tensor,
    K: tl.constexpr, KW: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """Each group of channels writes its own part of the offsets' and the mask's gradients, to be summed outside."""
    k = tl.program_id(0)
    first = tl.program_id(1) * CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    part = (tl.program_id(1).to(tl.int64) * B + b) * P * K
    gy, x, w, gw = gy + b * P * C, x + b * H * W * C, w + (b * K + k) * C, gw + (b * K + k) * C
    offset = offset + b * P * K * 2 if offset is not None else None
    mask = mask + b * P * K if mask is not None else None
    sums = _zeros(CHUNKS, BLOCK_P, BLOCK_C)
    for first_position in range(0, P, BLOCK_P):
        p = first_position + tl.arange(0, BLOCK_P)
        row, column = _regular_points(p, out_width, stride, padding)
        row, column = _tap_points(row, column, offset, p * K + k, p < P, k, dilation, KW)
        amount = tl.load(mask + p * K + k, mask=p < P, other=0.0) if mask is not None else 1.0
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
def _input_kernel(
    gy: tl.tensor, w: tl.tensor, offset: tl.tensor | None, mask: tl.tensor | None, rows: tl.tensor, gx: tl.tensor,
    H: tl.tensor, W: tl.tensor, C: tl.tensor, P: tl.tensor, out_width: tl.tensor, stride: tl.tensor, padding: tl.tensor,
    dilation: tl.tensor, spans: tl.tensor,
    K: tl.constexpr, KW: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """rows: (B, K, spans, 2), first and last row that each block of positions samples at."""
    first_pixel = tl.program_id(0) * BLOCK_Q
    q = first_pixel + tl.arange(0, BLOCK_Q)
    first = tl.program_id(1) * CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    gy, w, gx, rows = gy + b * P * C, w + b * K * C, gx + b * H * W * C, rows + b * K * spans * 2
    offset = offset + b * P * K * 2 if offset is not None else None
    mask = mask + b * P * K if mask is not None else None
    first_row = (first_pixel // W).to(tl.float32)
    last_row = ((first_pixel + BLOCK_Q - 1) // W).to(tl.float32)
    pixel_row, pixel_column = (q // W).to(tl.float32), (q % W).to(tl.float32)
    totals = _zeros(CHUNKS, BLOCK_Q, BLOCK_C)
    for k in range(K):
        for span in range(spans):
            sampled = rows + (k * spans + span) * 2
            beyond = (tl.load(sampled) >= last_row + 1) | (tl.load(sampled + 1) <= first_row - 1)
            if not beyond:  # rows that are NaN are beyond nothing
                p = span * BLOCK_P + tl.arange(0, BLOCK_P)
                row, column = _regular_points(p, out_width, stride, padding)
                row, column = _tap_points(row, column, offset, p * K + k, p < P, k, dilation, KW)
                hats = _hats(row[None, :] - pixel_row[:, None]) * _hats(column[None, :] - pixel_column[:, None])
                if mask is not None:
                    hats *= tl.load(mask + p * K + k, mask=p < P, other=0.0)[None, :]
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
    groups, constants = g.channel_groups(BLOCKS.chunks)
    inside = _inside(x, weight, offset, mask)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        _forward_kernel[(triton.cdiv(g.positions, BLOCKS.positions), groups, g.batch)](
            *inside, y, *g.sizes, **constants, BLOCK_P=BLOCKS.positions, num_warps=BLOCKS.warps
        )
    return y.permute(0, 3, 1, 2)


def backward(
    gradient: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sampled_conv.kernel_backward`."""
    g = _Geometry(x, weight, offset, mask, geometry)
    gy, inside = pixels(gradient, x.dtype), _inside(x, weight, offset, mask)
    with torch.cuda.device_of(x):
        gw, goffset, gmask = _weight_offset_gradients(g, gy, inside)
        gx = _input_gradient(g, gy, inside)
    return (
        map_back(gx, x),
        taps_back(gw, weight),
        _sum(goffset, offset, x),
        _sum(gmask, mask, x),
    )


def _sum(parts: Tensor | None, like: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of an offset or a mask, from each group's part; an empty one of what is not there."""
    return map_back(parts.sum(dim=0), like) if parts is not None and like is not None else x.new_empty(0)


def _weight_offset_gradients(g: "_Geometry", gy: Tensor, inside: tuple) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of w; and of offset and mask in parts, one for each group of channels."""
    _, w, offset, mask = inside
    groups, constants = g.channel_groups(BLOCKS.chunks)
    gw, parts = torch.empty_like(w), (groups, g.batch, g.positions, g.kernel)
    goffset = gw.new_empty(*parts, 2) if offset is not None else None
    gmask = gw.new_empty(parts) if mask is not None else None
    _weight_offset_kernel[(g.kernel, groups, g.batch)](
        gy, *inside, gw, goffset, gmask, *g.sizes[:4], g.batch, *g.sizes[4:], **constants,
        BLOCK_P=BLOCKS.positions, num_warps=BLOCKS.warps,
    )  # fmt: skip
    return gw, goffset, gmask


def _input_gradient(g: "_Geometry", gy: Tensor, inside: tuple) -> Tensor:
    x, w, offset, mask = inside
    gx, rows = torch.empty_like(x), _sampled_rows(offset, g)
    # A float32 product takes as many registers as there are for one chunk
    groups, constants = g.channel_groups(BLOCKS.chunks if x.element_size() == 2 else 1)
    _input_kernel[(triton.cdiv(x.shape[1] * x.shape[2], BLOCKS.pixels), groups, g.batch)](
        gy, w, offset, mask, rows, gx, *g.sizes, rows.shape[2], **constants,
        BLOCK_Q=BLOCKS.pixels, BLOCK_P=BLOCKS.points, num_warps=BLOCKS.hat_warps,
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
        self.kernel, self.kernel_width = weight.shape[2] * weight.shape[3], weight.shape[3]
        self.sizes = (height, width, self.channels, self.positions, self.out[1], *geometry)
        self.stride, self.padding, self.dilation = geometry

    def channel_groups(self, chunks: int) -> tuple[int, dict]:
        """How many programs share the channels if one takes at most `chunks` blocks, and the constants that follow."""
        blocks = triton.cdiv(self.channels, BLOCKS.channels)
        chunks = min(blocks, chunks)
        constants = {
            "K": self.kernel,
            "KW": self.kernel_width,
            "CHUNKS": chunks,
            "WHOLE": self.channels % (chunks * BLOCKS.channels) == 0,
            "BLOCK_C": BLOCKS.channels,
        }
        return triton.cdiv(blocks, chunks), constants


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
    positions, taps_ = torch.arange(g.positions, device=g.device), torch.arange(g.kernel, device=g.device)
    rows = (positions // g.out[1] * g.stride - g.padding)[:, None] + taps_ // g.kernel_width * g.dilation  # (P, K)
    rows = rows.to(torch.float32).expand(g.batch, -1, -1)
    if offset is not None:
        rows = rows + offset.view(g.batch, g.positions, g.kernel, 2)[..., 0]
    spans = triton.cdiv(g.positions, BLOCKS.points)
    missing = spans * BLOCKS.points - g.positions
    blocks = torch.cat([rows, rows[:, -1:].expand(-1, missing, -1)], dim=1).unflatten(1, (spans, BLOCKS.points))
    return torch.stack([blocks.amin(dim=2), blocks.amax(dim=2)], dim=-1).transpose(1, 2).contiguous()

"""Contextual convolution (section 3.3, equation 4) as one pure function, depthwise or dense.

    y(p) = sum_k (w(k) + dw(k)) x(p + g(k) + dp(k)) + b         bilinear, zero outside the map

This file says what the operation is; the sampled part of it, with the combined weight of each sample, is an operator
of its own with several implementations (sampled_conv.py).

Shapes: B samples, C channels, H W input map, P = Ho Wo output map, K = kh kw taps, O output channels.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torchvision.ops import deform_conv2d

from contextual_cnn.ops.implementation import Implementation
from contextual_cnn.ops.sampled_conv import sampled_conv2d


def contextual_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_offset: Tensor | None = None,
    sampling_offset: Tensor | None = None,
    mask: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    implementation: Implementation = "auto",
) -> Tensor:
    """Convolution whose weights and sampling positions may differ from sample to sample.

    Depthwise, with a (C, 1, kh, kw) weight, or dense, with an (O, C, kh, kw) weight whose offsets dw all output
    channels share. Without offsets and mask it is `F.conv2d`.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, kh, kw) or (O, C, kh, kw), the static kernel w. One channel counts as depthwise.
        bias: (C,) or (O,).
        weight_offset: (B, C, kh, kw), dw, added to the static kernel.
        sampling_offset: (B, 2K, Ho, Wo), dp in pixels; channels 2k and 2k+1 are y and x of tap k. The gradient
            at whole pixels, where bilinear interpolation has a kink, is the right-hand one (as torchvision's).
        mask: (B, K, Ho, Wo), a factor per tap and position (released code; not in the paper).
        implementation: who computes the sampled part; auto takes the fastest (sampled_conv.py).

    Returns:
        (B, C, Ho, Wo) or (B, O, Ho, Wo) in x's dtype.

    Raises:
        ValueError: shapes that do not belong together.
        UserError: an implementation that is not to be had.
    """
    _check_shapes(x, weight, weight_offset, sampling_offset, mask, stride, padding, dilation)
    geometry = (stride, padding, dilation)
    compute = _depthwise if weight.shape[1] == 1 else _dense
    y = compute(x, weight, weight_offset, sampling_offset, mask, geometry, implementation)
    return y if bias is None else y + bias.to(y.dtype).view(1, -1, 1, 1)


def _depthwise(
    x: Tensor,
    weight: Tensor,
    weight_offset: Tensor | None,
    sampling_offset: Tensor | None,
    mask: Tensor | None,
    geometry: tuple[int, int, int],
    implementation: Implementation,
) -> Tensor:
    regular = sampling_offset is None and mask is None
    if regular and weight_offset is None:
        return conv2d(x, weight.to(x.dtype), None, *geometry, groups=x.shape[1])
    # (C, 1, kh, kw) + (B, C, kh, kw) -> (B, C, kh, kw); one map for both keeps the gradient of each for free.
    # Squeezed as the last axis, so that the gradient has a channels_last weight's strides, as DDP's buckets have them
    combined = weight.movedim(1, -1).squeeze(-1).unsqueeze(0)
    combined = combined + weight_offset if weight_offset is not None else combined.expand(x.shape[0], -1, -1, -1)
    if regular:
        return _per_sample_conv2d(x, combined, *geometry)
    return sampled_conv2d(x, combined, sampling_offset, mask, geometry, implementation)


def _dense(
    x: Tensor,
    weight: Tensor,
    weight_offset: Tensor | None,
    sampling_offset: Tensor | None,
    mask: Tensor | None,
    geometry: tuple[int, int, int],
    implementation: Implementation,
) -> Tensor:
    """The static part is one batched convolution; dw is the same for every output channel, so its part is one map.

    sum_{c,k} (w(o,c,k) + dw(c,k)) x(..) = sum_{c,k} w(o,c,k) x(..) + [sum_{c,k} dw(c,k) x(..), the same for every o]
    """
    stride, padding, dilation = geometry
    if sampling_offset is None and mask is None:
        y = conv2d(x, weight.to(x.dtype), None, *geometry)
    else:
        # torchvision's operator has no low precision on CPUs; with one group it is a batched matrix product
        offset = sampling_offset
        if offset is None:
            assert mask is not None
            offset = torch.zeros_like(mask).repeat(1, 2, 1, 1)
        exact = torch.promote_types(x.dtype, torch.float32)
        amount = mask.to(exact) if mask is not None else None
        with torch.autocast(x.device.type, enabled=False):
            y = deform_conv2d(
                x.to(exact), offset.to(exact), weight.to(exact), None, stride, padding, dilation, amount
            ).to(x.dtype)
    if weight_offset is None:
        return y
    nothing = weight_offset.new_zeros(x.shape[1], 1, *weight.shape[2:])
    thin = _depthwise(x, nothing, weight_offset, sampling_offset, mask, geometry, implementation)
    return y + thin.sum(dim=1, keepdim=True, dtype=y.dtype)  # autocast's own choice, float32, would make all of y so


def _per_sample_conv2d(x: Tensor, combined: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """The regular grid with a kernel of its own per sample: one grouped convolution of B*C channels."""
    batch, channels = x.shape[:2]
    kernel = combined.to(x.dtype).flatten(0, 1).unsqueeze(1)  # (B*C, 1, kh, kw)
    y = conv2d(x.flatten(0, 1).unsqueeze(0), kernel, None, stride, padding, dilation, groups=batch * channels)
    return y.view(batch, channels, *y.shape[2:])


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Length of a convolution's output along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    weight_offset: Tensor | None,
    sampling_offset: Tensor | None,
    mask: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
) -> None:
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[-2:]
    if weight.shape[:2] != (channels, 1) and weight.shape[1] != channels:
        raise ValueError(
            f"weight must be ({channels}, 1, kh, kw) or (O, {channels}, kh, kw) for x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    out = (
        output_size(height, kh, stride, padding, dilation),
        output_size(width, kw, stride, padding, dilation),
    )
    for name, tensor, shape in (
        ("weight_offset", weight_offset, (batch, channels, kh, kw)),
        ("sampling_offset", sampling_offset, (batch, 2 * kh * kw, *out)),
        ("mask", mask, (batch, kh * kw, *out)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")

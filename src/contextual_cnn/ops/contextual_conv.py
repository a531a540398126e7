"""Contextual convolution (section 3.3, equation 4), depthwise, as one pure function.

    y(p) = sum_k (w(k) + dw(k)) x(p + g(k) + dp(k)) + b         bilinear, zero outside the map

This file says what the operation is; the sampled part of it, with the combined weight of each sample, is an operator
of its own with several implementations (sampled_conv.py).

Shapes: B samples, C channels, H W input map, P = Ho Wo output map, K = kh kw taps.
"""

from torch import Tensor
from torch.nn.functional import conv2d

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
) -> Tensor:
    """Depthwise convolution whose weights and sampling positions may differ from sample to sample.

    Without offsets and mask it is `F.conv2d(x, weight, bias, groups=C)`.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, kh, kw), the static kernel w.
        bias: (C,).
        weight_offset: (B, C, kh, kw), dw, added to the static kernel.
        sampling_offset: (B, 2K, Ho, Wo), dp in pixels; channels 2k and 2k+1 are y and x of tap k. The gradient
            at whole pixels, where bilinear interpolation has a kink, is the right-hand one (as torchvision's).
        mask: (B, K, Ho, Wo), a factor per tap and position (released code; not in the paper).

    Returns:
        (B, C, Ho, Wo) in x's dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check_shapes(x, weight, weight_offset, sampling_offset, mask, stride, padding, dilation)
    if sampling_offset is None and mask is None and weight_offset is None:
        return conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])
    # (C, 1, kh, kw) + (B, C, kh, kw) -> (B, C, kh, kw); one map for both keeps the gradient of each for free
    combined = weight.squeeze(1).unsqueeze(0)
    combined = combined + weight_offset if weight_offset is not None else combined.expand(len(x), -1, -1, -1)
    if sampling_offset is None and mask is None:
        y = _per_sample_conv2d(x, combined, stride, padding, dilation)
    else:
        y = sampled_conv2d(x, combined, sampling_offset, mask, stride, padding, dilation)
    return y if bias is None else y + bias.to(y.dtype).view(1, -1, 1, 1)


def _per_sample_conv2d(x: Tensor, combined: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """The regular grid with a kernel of its own per sample: one grouped convolution of B*C channels."""
    batch, channels = x.shape[:2]
    kernel = combined.to(x.dtype).flatten(0, 1).unsqueeze(1)  # (B*C, 1, kh, kw)
    y = conv2d(x.flatten(0, 1).unsqueeze(0), kernel, None, stride, padding, dilation, groups=batch * channels)
    return y.view(batch, channels, *y.shape[2:])


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Length of a convolution's output along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _check_shapes(x, weight, weight_offset, sampling_offset, mask, stride, padding, dilation) -> None:
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[-2:]
    if weight.shape[:2] != (channels, 1):
        raise ValueError(f"weight must be ({channels}, 1, kh, kw) for x {tuple(x.shape)}, got {tuple(weight.shape)}")
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

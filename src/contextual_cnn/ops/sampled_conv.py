"""The sampled convolution: one signature, and the choice of who computes it.

    y(p) = sum_k weight(k) mask(k, p) x(p + g(k) + offset(k, p))        per sample and channel, zero outside the map

The compiled kernels (C++ on a CPU) stand behind a torch operator, which is all that autograd, torch.compile and
torch.export see of them. The plain torch form needs none: torch differentiates and compiles it as it stands.

Precision: x, weight, offset and mask may have any floating type; sums and positions are float32 at least, y has x's
type. Autocast changes nothing here: callers bring x in the type they want, and the offsets in float32.

Shapes: x (B, C, H, W), weight (B, C, kh, kw), offset (B, 2K, Ho, Wo), mask (B, K, Ho, Wo), y (B, C, Ho, Wo).
"""

import os
from typing import Literal

import torch
from torch import Tensor

from contextual_cnn.errors import UserError
from contextual_cnn.ops import sampled_conv_cpp, sampled_conv_torch

Implementation = Literal["cpp", "torch"]


def sampled_conv2d(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """Offset or mask, or both, must be there. Returns y, channels_last."""
    if implementation(x.device.type) == "torch":
        return sampled_conv_torch.forward(x, weight, offset, mask, stride, padding, dilation)
    return kernel(x, weight, offset, mask, stride, padding, dilation)


@torch.compiler.assume_constant_result
def implementation(device_type: str) -> Implementation:
    """Who computes on this kind of device; the environment's CONTEXTUAL_CNN_OPS=cpp or torch insists on one."""
    wanted = os.environ.get("CONTEXTUAL_CNN_OPS")
    if wanted not in (None, "cpp", "torch"):
        raise UserError(f"CONTEXTUAL_CNN_OPS={wanted} is not one of cpp, torch", "unset it, the choice is automatic")
    if device_type != "cpu" or wanted == "torch":
        return "torch"
    return "cpp" if sampled_conv_cpp.is_available() else "torch"


@torch.library.custom_op("contextual_cnn::sampled_conv2d", mutates_args=(), device_types="cpu")
def kernel(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """The operator. Another device's kernel joins by `kernel.register_kernel`."""
    return sampled_conv_cpp.forward(x, weight, offset, mask, stride, padding, dilation)


@torch.library.custom_op("contextual_cnn::sampled_conv2d_backward", mutates_args=(), device_types="cpu")
def kernel_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, offset and mask; an empty one for an offset or a mask that is not there."""
    return sampled_conv_cpp.backward(gradient, x, weight, offset, mask, stride, padding, dilation)


@kernel.register_fake
def _(x, weight, offset, mask, stride, padding, dilation):
    like = offset if offset is not None else mask
    return x.new_empty(x.shape[0], *like.shape[2:], x.shape[1]).permute(0, 3, 1, 2)


@kernel_backward.register_fake
def _(gradient, x, weight, offset, mask, stride, padding, dilation):
    return tuple(torch.empty_like(t) if t is not None else x.new_empty(0) for t in (x, weight, offset, mask))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, gradient: Tensor):
    tensors = ctx.saved_tensors
    gradients = kernel_backward(gradient, *tensors, ctx.stride, ctx.padding, ctx.dilation)
    return *(g if t is not None else None for g, t in zip(gradients, tensors, strict=True)), None, None, None


kernel.register_autograd(_differentiate, setup_context=_save)

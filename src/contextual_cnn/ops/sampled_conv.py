"""The sampled convolution: one signature, and the choice of who computes it.

    y(p) = sum_k weight(k) mask(k, p) x(p + g(k) + offset(k, p))        per sample and channel, zero outside the map

The compiled kernels (C++ on a CPU, Triton on a GPU) stand behind a torch operator, which is all that autograd,
torch.compile and torch.export see of them. The plain torch form needs none: torch differentiates and compiles it as
it stands.

Precision: x, weight, offset and mask may have any floating type; sums and positions are float32 at least, y has x's
type. Autocast changes nothing here: callers bring x in the type they want, and the offsets in float32.

Shapes: x (B, C, H, W), weight (B, C, kh, kw), offset (B, 2K, Ho, Wo), mask (B, K, Ho, Wo), y (B, C, Ho, Wo).
geometry is (stride, padding, dilation).
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from contextual_cnn.errors import UserError
from contextual_cnn.ops import sampled_conv_cpp, sampled_conv_torch

log = logging.getLogger(__name__)

Implementation = Literal["cpp", "triton", "torch"]


def sampled_conv2d(
    x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    """Offset or mask, or both, must be there. Returns y, channels_last."""
    if implementation(x.device.type, x.dtype) == "torch":
        return sampled_conv_torch.forward(x, weight, offset, mask, geometry)
    return kernel(x, weight, offset, mask, geometry)


@torch.compiler.assume_constant_result
def implementation(device_type: str, dtype: torch.dtype) -> Implementation:
    """Who computes this type on this kind of device; CONTEXTUAL_CNN_OPS=torch in the environment means plain torch."""
    wanted = os.environ.get("CONTEXTUAL_CNN_OPS", "auto")
    if wanted not in ("auto", "torch"):
        raise UserError(f"CONTEXTUAL_CNN_OPS={wanted} is not one of auto, torch", "unset it, the choice is automatic")
    if wanted == "auto" and device_type == "cpu" and sampled_conv_cpp.is_available():
        return "cpp"
    # The Triton kernels add up in float32, which is not enough for float64
    if wanted == "auto" and device_type == "cuda" and dtype != torch.float64 and _triton_is_available():
        return "triton"
    return "torch"


@cache
def _triton_is_available() -> bool:
    try:
        import contextual_cnn.ops.sampled_conv_triton  # noqa: F401
    except ImportError as error:
        log.warning("Triton is not available (%s); plain torch is used, several times slower on a GPU", error)
        return False
    return True


@torch.library.custom_op("contextual_cnn::sampled_conv2d", mutates_args=(), device_types="cpu")
def kernel(x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]) -> Tensor:
    """The operator, on a CPU."""
    return sampled_conv_cpp.forward(x, weight, offset, mask, geometry)


@torch.library.custom_op("contextual_cnn::sampled_conv2d_backward", mutates_args=(), device_types="cpu")
def kernel_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, offset and mask; an empty one for an offset or a mask that is not there."""
    return sampled_conv_cpp.backward(gradient, x, weight, offset, mask, geometry)


@kernel.register_kernel("cuda")
def _(*arguments):
    from contextual_cnn.ops import sampled_conv_triton  # only where there is a GPU: importing Triton takes a second

    return sampled_conv_triton.forward(*arguments)


@kernel_backward.register_kernel("cuda")
def _(*arguments):
    from contextual_cnn.ops import sampled_conv_triton

    return sampled_conv_triton.backward(*arguments)


@kernel.register_fake
def _(x, weight, offset, mask, geometry):
    like = offset if offset is not None else mask
    return _empty_channels_last(x, (*x.shape[:2], *like.shape[2:]))


@kernel_backward.register_fake
def _(gradient, x, weight, offset, mask, geometry):
    tensors = (x, weight, offset, mask)
    return tuple(_empty_channels_last(t, t.shape) if t is not None else x.new_empty(0) for t in tensors)


def _empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """All that the kernels give has channels innermost, whatever the layout of what they get."""
    return like.new_empty(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.geometry = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, gradient: Tensor):
    tensors = ctx.saved_tensors
    gradients = kernel_backward(gradient, *tensors, ctx.geometry)
    return *(g if t is not None else None for g, t in zip(gradients, tensors, strict=True)), None


kernel.register_autograd(_differentiate, setup_context=_save)

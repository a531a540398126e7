"""The sampled convolution: one signature, whoever computes it (implementation.py).

    y(p) = sum_k weight(k) mask(k, p) x(p + g(k) + offset(k, p))        per sample and channel, zero outside the map

The compiled kernels (C++ on a CPU, Triton on a GPU) stand behind a torch operator, which is all that autograd,
torch.compile and torch.export see of them. The plain torch form needs none: torch differentiates and compiles it as
it stands.

Precision: x, weight, offset and mask may have any floating type; sums and positions are float32 at least, y has x's
type. Autocast changes nothing here: callers bring x in the type they want, and the offsets in float32.

Shapes: x (B, C, H, W), weight (B, C, kh, kw), offset (B, 2K, Ho, Wo), mask (B, K, Ho, Wo), y (B, C, Ho, Wo).
geometry is (stride, padding, dilation).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contextual_cnn.ops import sampled_conv_cpp, sampled_conv_torch
from contextual_cnn.ops.implementation import Implementation, choose, wanted_of
from contextual_cnn.ops.memory_format import output_shape


def sampled_conv2d(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    geometry: Sequence[int],
    implementation: Implementation = "auto",
) -> Tensor:
    """Offset or mask, or both, must be there. Returns y, channels_last.

    Args:
        implementation: auto takes what CONTEXTUAL_CNN_OPS in the environment names, else the fastest there is.

    Raises:
        UserError: an implementation that does not exist, or cannot compute these tensors on this machine.
    """
    wanted = wanted_of(implementation)
    chosen = choose(wanted, x.device.type, x.dtype)
    if chosen == "torch" and not torch.compiler.is_exporting():  # export wants one operator (standard_operators.py)
        return sampled_conv_torch.forward(x, weight, offset, mask, geometry)
    return kernel(x, weight, offset, mask, geometry, wanted)


def _compiled(wanted: str, x: Tensor) -> ModuleType:
    """The module with the kernels. Asked when they run, so that an exported program may run on another device."""
    name = choose(wanted, x.device.type, x.dtype)
    if name == "triton":
        from contextual_cnn.ops import sampled_conv_triton  # only where it is used: importing Triton takes a second

        return sampled_conv_triton
    return {"cpp": sampled_conv_cpp, "torch": sampled_conv_torch}[name]


@torch.library.custom_op("contextual_cnn::sampled_conv2d", mutates_args=())
def kernel(
    x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int], wanted: str
) -> Tensor:
    """The operator. wanted: auto, cpp or triton."""
    return _compiled(wanted, x).forward(x, weight, offset, mask, geometry)


@torch.library.custom_op("contextual_cnn::sampled_conv2d_backward", mutates_args=())
def kernel_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    geometry: Sequence[int],
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, offset and mask; an empty one for an offset or a mask that is not there."""
    return _compiled(wanted, x).backward(gradient, x, weight, offset, mask, geometry)


@kernel.register_fake
def _(
    x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int], wanted: str
) -> Tensor:
    return _empty_channels_last(x, (*x.shape[:2], *output_shape(offset, mask)))


@kernel_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    geometry: Sequence[int],
    wanted: str,
) -> tuple[Tensor, ...]:
    gx, *maps = (_empty_channels_last(t, t.shape) if t is not None else x.new_empty(0) for t in (x, offset, mask))
    return gx, weight.new_empty(weight.shape), *maps


def _empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """All maps that the kernels give have channels innermost, whatever the layout of what they get."""
    return like.new_empty(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.geometry, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = kernel_backward(gradient, *tensors, ctx.geometry, ctx.wanted)
    return *(g if t is not None else None for g, t in zip(gradients, tensors, strict=True)), None, None


kernel.register_autograd(_differentiate, setup_context=_save)

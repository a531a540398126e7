"""The depthwise convolution: torch's own, or on a GPU Triton kernels behind a torch operator.

    y(c, p) = sum_k weight(c, k) x(c, p + g(k)) + bias(c)                                    zero outside the map

On a GPU the maps come in the type they have, sums and weights are float32, and y has the type that is asked for: no
copy of a float32 weight in low precision, and no float32 copy of a map whose convolution is to be exact.

Shapes: x (B, C, H, W), weight (C, 1, kh, kw), bias (C,), y (B, C, Ho, Wo). Stride and dilation are 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from contextual_cnn.ops.implementation import Implementation, choose, wanted_of


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    dtype: torch.dtype | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """A kernel of its own for every channel. Autocast changes nothing here.

    Args:
        dtype: of y; None takes x's.
        implementation: as in `sampled_conv2d`; a CPU has torch's alone.

    Raises:
        UserError: an implementation that cannot compute these tensors on this machine.
    """
    dtype = dtype or x.dtype
    if choose(wanted_of(implementation), x.device.type, x.dtype) == "triton":
        # torch's way through an operator in Python takes longer than the kernels; only a compiler needs it
        plain = type(x) is Tensor and not torch.compiler.is_compiling()
        compute = _Function.apply if plain else kernel
        return compute(x, weight, bias, padding, dtype)
    exact = torch.promote_types(x.dtype, dtype)
    with torch.autocast(x.device.type, enabled=False):
        shift = bias.to(exact) if bias is not None else None
        return conv2d(x.to(exact), weight.to(exact), shift, padding=padding, groups=x.shape[1]).to(dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dtype: torch.dtype) -> Tensor:
    """Returns y, channels_last."""
    from contextual_cnn.ops import depthwise_conv_triton  # only where it is used: importing Triton takes a second

    return depthwise_conv_triton.forward(x, weight, bias, padding, dtype)


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: int, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weight; an empty one for what is not asked for."""
    from contextual_cnn.ops import depthwise_conv_triton

    empty = x.new_empty(0)
    return (
        depthwise_conv_triton.input_gradient(gradient, weight, padding, x.dtype) if of_x else empty,
        depthwise_conv_triton.weight_gradient(gradient, x, weight.shape[2:], padding).to(weight.dtype)
        if of_weight
        else empty,
    )


kernel = torch.library.custom_op("contextual_cnn::depthwise_conv2d", _forward, mutates_args=())
kernel_backward = torch.library.custom_op("contextual_cnn::depthwise_conv2d_backward", _backward, mutates_args=())


@kernel.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dtype: torch.dtype) -> Tensor:
    out = (size + 2 * padding - taps + 1 for size, taps in zip(x.shape[2:], weight.shape[2:], strict=True))
    return x.new_empty(x.shape[0], *out, x.shape[1], dtype=dtype).permute(0, 3, 1, 2)


@kernel_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, padding: int, of_x: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    batch, channels, *size = x.shape
    gx = x.new_empty(batch, *size, channels).permute(0, 3, 1, 2) if of_x else x.new_empty(0)
    return gx, weight.new_empty(weight.shape) if of_weight else x.new_empty(0)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.padding, _ = inputs
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, gradient: Tensor, backward: Callable = kernel_backward) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
    gx, gw = backward(gradient, x, weight, ctx.padding, of_x, of_weight)
    gb = gradient.sum(dim=(0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if of_bias else None
    return gx if of_x else None, gw if of_weight else None, gb, None, None


kernel.register_autograd(_differentiate, setup_context=_save)


class _Function(torch.autograd.Function):
    """The operator without the operator."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dtype: torch.dtype) -> Tensor:
        return _forward(x, weight, bias, padding, dtype)

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, gradient, _backward)

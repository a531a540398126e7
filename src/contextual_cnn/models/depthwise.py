"""Depthwise convolutions as modules, computed by our own kernels where there is a GPU."""

import torch
from torch import Tensor, nn

from contextual_cnn.ops import depthwise_conv2d


def as_conv2d_takes(x: Tensor) -> Tensor:
    """x in the type in which autocast, where it is on, lets torch's convolutions compute.

    Autocast knows torch's own operators. It would leave ours in float32 wherever the residual stream is float32.
    """
    kind = x.device.type
    lowered = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # which autocast leaves alone, too
    return x.to(torch.get_autocast_dtype(kind)) if lowered else x


class DepthwiseConv2d(nn.Conv2d):
    """torch's module with `depthwise_conv2d` for its forward pass: stride and dilation 1, one padding."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, Ho, Wo).

        Args:
            dtype: of the result, computed of x as it is; None follows autocast.
        """
        padding = self.padding[0]
        assert isinstance(padding, int)  # see `can_be_ours`
        x = as_conv2d_takes(x) if dtype is None else x
        return depthwise_conv2d(x, self.weight, self.bias, padding=padding, dtype=dtype)


def can_be_ours(conv: nn.Conv2d) -> bool:
    """Whether `DepthwiseConv2d` computes the same."""
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and len(set(conv.padding)) == 1
    )


def use_own_depthwise(model: nn.Module) -> int:
    """Makes a model's depthwise convolutions of 5 x 5 taps or more ours, and returns how many there are.

    Smaller ones wait for memory, whoever computes them. Names, parameters and hooks stay.
    """
    convolutions = [
        module
        for module in model.modules()
        if type(module) is nn.Conv2d and min(module.kernel_size) >= 5 and can_be_ours(module)
    ]
    for module in convolutions:
        module.__class__ = DepthwiseConv2d
    return len(convolutions)

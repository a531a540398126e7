"""The contextual convolution as a layer (section 3.3): it predicts what the op takes, from features and context.

Shapes: B images, C channels, H W map, E context size, K kernel taps.
"""

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from contextual_cnn.ops import contextual_conv2d


class ContextualConv2d(nn.Module):
    """A depthwise convolution modulated by a context vector, in the place of `nn.Conv2d(groups=channels)`.

    `weight` and `bias` have the names and shapes of the convolution that it replaces, and the offsets start at
    zero: with a plain model's weights a fresh layer computes exactly what the plain layer computes.

    Args:
        channels: input and output channels.
        context_dim: E.
        kernel_size: odd; the padding keeps the size of the map.
        weight_reduction: the hidden width of the weight offsets is channels / weight_reduction (released code:
            16 for 7x7).
        mask: adds the released code's sigmoid factor per tap, which the paper does not have. It starts at 1
            (2 sigmoid(0)), so that a fresh layer still equals the static one; the released code starts at 1/2.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        kernel_size: int = 7,
        weight_reduction: int = 16,
        mask: bool = False,
    ) -> None:
        super().__init__()
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.weight_offset = WeightOffset(channels, context_dim, kernel_size, weight_reduction)
        self.sampling_offset = SamplingOffset(channels, context_dim, kernel_size, maps_per_tap=2)
        self.mask = SamplingOffset(channels, context_dim, kernel_size, maps_per_tap=1) if mask else None
        nn.init.trunc_normal_(self.weight, std=0.02)  # ConvNeXt's initialisation

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) features and (B, E) context -> (B, C, H, W)."""
        return contextual_conv2d(
            x,
            self.weight,
            self.bias,
            weight_offset=self.weight_offset(x, context),
            sampling_offset=self.sampling_offset(x, context),
            mask=2 * self.mask(x, context).sigmoid() if self.mask is not None else None,
            padding=self.padding,
        )


class WeightOffset(nn.Module):
    """dw: [GAP(x), context] -> FC, LN, ReLU, FC -> a kernel of its own for every image and channel."""

    def __init__(self, channels: int, context_dim: int, kernel_size: int, reduction: int) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.kernel_size = kernel_size
        self.hidden = nn.Sequential(nn.Linear(channels + context_dim, hidden), nn.LayerNorm(hidden), nn.ReLU())
        self.out = nn.Linear(hidden, channels * kernel_size**2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C, kh, kw)."""
        hidden = self.hidden(torch.cat([x.mean(dim=(2, 3)), context], dim=1))
        return self.out(hidden).view(len(x), x.shape[1], self.kernel_size, self.kernel_size)


class SamplingOffset(nn.Module):
    """dp: [x, expand(context)] -> 1x1 conv, LN, ReLU, depthwise conv -> maps shared by all channels.

    The context is the same at every position, so its part of the 1x1 convolution is computed once per image
    and added; the expanded map of the paper's figure 3b is never made.
    """

    def __init__(self, channels: int, context_dim: int, kernel_size: int, maps_per_tap: int) -> None:
        super().__init__()
        maps = maps_per_tap * kernel_size**2
        self.from_features = nn.Conv2d(channels, maps, 1)
        self.from_context = nn.Linear(context_dim, maps, bias=False)
        self.norm = LayerNorm2d(maps)
        self.act = nn.ReLU()
        self.out = nn.Conv2d(maps, maps, kernel_size, padding=kernel_size // 2, groups=maps)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, maps, H, W) float32, in pixels."""
        hidden = self.from_features(x) + self.from_context(context)[:, :, None, None]
        hidden = self.act(self.norm(hidden))
        # float32 also under autocast: an offset rounded to bfloat16 costs the output as much precision as
        # all other roundings together
        with torch.autocast(x.device.type, enabled=False):
            return self.out(hidden.to(self.out.weight.dtype))

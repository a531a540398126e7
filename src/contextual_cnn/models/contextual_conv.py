"""The convolutions that take a plain one's place (section 3.3), and the paper's ablations of them (tables 4 and 5).

Each takes over weight and bias of the convolution that it replaces, under their names, and adds nothing at first: what
generates its offsets ends in a layer of zeros. So with a plain model's weights it computes exactly what the plain one
computed.

Shapes: B images, C input channels, O output channels, H W map, Ho Wo output map, E context size, K kernel taps.
"""

from typing import Any, NamedTuple, TypedDict

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import conv2d

from contextual_cnn.contracts import at_least_float32
from contextual_cnn.models.class_context import vector_norm
from contextual_cnn.models.depthwise import DepthwiseConv2d, as_conv2d_takes, can_be_ours
from contextual_cnn.models.valid_mean import GlobalMean
from contextual_cnn.ops import contextual_conv2d
from contextual_cnn.ops.implementation import implementation_on
from contextual_cnn.settings.model import ContextLayers, Convolution, Norm


class Generators(NamedTuple):
    """What may be chosen about the layers that make offsets, scales and masks of features and context.

    norm: "layer" (the paper) or "batch" (the released ResNet). What they are given is nearly the same for all images:
        pooled features, and a context behind a ReLU. A layer norm leaves that, a batch norm takes it out.
    width: hidden units of `WeightOffset`, at least; the released code's share of the channels leaves a narrow model 3.
    bias: of the last layer of `WeightOffset`. It is a second static kernel, which weight decay spares.
    layers: of `TapMaps`. "paper": sampling offsets and mask have layers of their own. "released": one makes both.
    """

    norm: Norm = "layer"
    width: int = 1
    bias: bool = True
    layers: ContextLayers = "paper"


PAPERS_GENERATORS = Generators()


def replace_convolution(
    conv: nn.Conv2d,
    kind: Convolution,
    context_dim: int,
    generators: Generators = PAPERS_GENERATORS,
    mask: bool = False,
) -> nn.Module:
    """What takes the place of a plain convolution.

    Args:
        kind: contextual is the paper's model (a5, b4). The others are rows of its ablations: weight_offsets or
            sampling_offsets alone (b2, b3), the context as extra_input to the plain convolution (a2, b1), contextual
            convolutions without_prior (a3), deformable convolutions (a4), plain (a1). Not in the paper: scale_shift.
        mask: of the kinds that generate offsets, see `ContextualConv2d`.
    """
    if kind == "plain":
        return conv
    if kind == "deformable":
        return DeformableConv2d(conv)
    if kind == "extra_input":
        return ExtraInputConv2d(conv, context_dim)
    if kind == "scale_shift":
        return ScaleShiftConv2d(conv, context_dim, generators)
    return ContextualConv2d(
        conv,
        context_dim if kind != "without_prior" else 0,
        generators,
        weight_offsets=kind != "sampling_offsets",
        sampling_offsets=kind != "weight_offsets",
        mask=mask,
    )


class Geometry(TypedDict):
    """Of a convolution with the same numbers along both axes."""

    stride: int
    padding: int
    dilation: int


class _Replacement(nn.Module):
    """Weight, bias and geometry of the convolution that was there."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.groups not in (1, conv.in_channels):
            raise ValueError(f"only dense and depthwise convolutions can be replaced, got groups={conv.groups}")
        self.weight, self.bias = conv.weight, conv.bias
        padding = conv.padding[0]
        assert isinstance(padding, int)  # "same" and "valid" are not offered by the models
        self.geometry = Geometry(stride=conv.stride[0], padding=padding, dilation=conv.dilation[0])


class ContextualConv2d(_Replacement):
    """A depthwise or dense convolution modulated by features and context (equation 4).

    Args:
        conv: the convolution to replace.
        context_dim: E; 0 leaves the context out, offsets then depend on the features alone.
        weight_offsets, sampling_offsets: which of the two there are.
        mask: adds the released code's sigmoid factor per tap, which the paper does not have. It starts at 1
            (2 sigmoid(0)), so that a fresh layer still equals the static one; the released code starts at 1/2.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        context_dim: int,
        generators: Generators = PAPERS_GENERATORS,
        *,
        weight_offsets: bool = True,
        sampling_offsets: bool = True,
        mask: bool = False,
    ) -> None:
        super().__init__(conv)
        self.taps = taps = self.weight[0, 0].numel()
        joint = mask and sampling_offsets and generators.layers == "released"  # sampling_offset makes the mask too
        maps = 3 * taps if joint else 2 * taps
        self.weight_offset = WeightOffset(conv, context_dim, generators) if weight_offsets else None
        self.sampling_offset = TapMaps(conv, context_dim, maps, generators) if sampling_offsets else None
        self.mask = TapMaps(conv, context_dim, taps, generators) if mask and not joint else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, C, H, W) features and (B, E) context -> (B, O, Ho, Wo)."""
        x = as_conv2d_takes(x)
        weight_offset = self.weight_offset(x, context) if self.weight_offset is not None else None
        sampling_offset = self.sampling_offset(x, context) if self.sampling_offset is not None else None
        mask = self.mask(x, context) if self.mask is not None else None
        if sampling_offset is not None and sampling_offset.shape[1] > 2 * self.taps:  # both from one layer
            sampling_offset, mask = sampling_offset.split([2 * self.taps, self.taps], dim=1)
        return contextual_conv2d(
            x,
            self.weight,
            self.bias,
            weight_offset=weight_offset,
            sampling_offset=sampling_offset,
            mask=2 * mask.sigmoid() if mask is not None else None,
            **self.geometry,
        )


class WeightOffset(nn.Module):
    """dw: [GAP(x), context] -> FC, LN, ReLU, FC -> a kernel of its own for every image and input channel."""

    is_generator = True  # for the optimizer, which may train it at another rate

    def __init__(self, conv: nn.Conv2d, context_dim: int, generators: Generators) -> None:
        super().__init__()
        self.kernel_size = tuple(conv.kernel_size)
        channels, taps = conv.in_channels, self.kernel_size[0] * self.kernel_size[1]
        width = _hidden_width(conv, generators)
        self.pool = GlobalMean()
        self.hidden = _hidden_layer(channels + context_dim, width, generators.norm)
        self.out = nn.Linear(width, channels * taps, bias=generators.bias)
        _zero(self.out)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C, kh, kw)."""
        return self.out(self.hidden(_joined(self.pool(x), context))).view(*x.shape[:2], *self.kernel_size)


def _hidden_width(conv: nn.Conv2d, generators: Generators) -> int:
    """C / 16 for 7x7 and C / 4 for 3x3, as in the released code."""
    return max(conv.in_channels // (16 if conv.weight[0, 0].numel() > 9 else 4), generators.width)


def _hidden_layer(inputs: int, width: int, norm: Norm) -> nn.Sequential:
    """(B, inputs) -> (B, width)."""
    return nn.Sequential(nn.Linear(inputs, width), vector_norm(norm, width), nn.ReLU())


def _joined(pooled: Tensor, context: Tensor | None) -> Tensor:
    """(B, C), (B, E) -> (B, C + E)."""
    return torch.cat([pooled, context], dim=1) if context is not None else pooled


class TapMaps(nn.Module):
    """dp: [x, expand(context)] -> 1x1 conv, LN, ReLU, depthwise conv -> maps shared by all channels.

    In the released code the last convolution is dense, and there are as many hidden maps as `WeightOffset` has units.

    The context is the same at every position, so its part of the 1x1 convolution is computed once per image
    and added; the expanded map of the paper's figure 3b is never made.

    The last convolution has size, stride and dilation of the one that it makes offsets for.
    """

    is_generator = True  # for the optimizer, which may train it at another rate

    def __init__(self, conv: nn.Conv2d, context_dim: int, maps: int, generators: Generators) -> None:
        super().__init__()
        dense = generators.layers == "released"
        width = _hidden_width(conv, generators) if dense else maps
        self.from_features = nn.Conv2d(conv.in_channels, width, 1)
        self.from_context = nn.Linear(context_dim, width, bias=False) if context_dim else None
        self.norm = nn.BatchNorm2d(width) if generators.norm == "batch" else LayerNorm2d(width)
        self.act = nn.ReLU()
        self.out = nn.Conv2d(width, maps, **_options_of(conv), groups=1 if dense else maps)
        if can_be_ours(self.out):
            self.out.__class__ = DepthwiseConv2d
        _zero(self.out)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, maps, Ho, Wo) float32; sampling offsets are in pixels."""
        hidden = self.from_features(x)
        if self.from_context is not None:
            hidden = hidden + self.from_context(context)[:, :, None, None]
        hidden = self.act(self.norm(hidden))
        # float32 also under autocast: an offset rounded to bfloat16 costs the output as much precision as
        # all other roundings together
        exact = self.out.weight.dtype
        if isinstance(self.out, DepthwiseConv2d):
            return self.out(hidden, dtype=exact)
        with torch.autocast(x.device.type, enabled=False):
            return self.out(hidden.to(exact))


class ExtraInputConv2d(_Replacement):
    """The context as further input channels of a plain convolution, expanded over the map (table 4, a2).

    A depthwise convolution has no channels to add to: there the context enters by a 1x1 convolution of its own.
    """

    def __init__(self, conv: nn.Conv2d, context_dim: int) -> None:
        super().__init__(conv)
        self.groups = conv.groups
        dense = conv.groups == 1
        self.from_context = nn.Conv2d(
            context_dim,
            conv.out_channels,
            bias=False,
            **_options_of(conv) | ({} if dense else dict(kernel_size=1, padding=0)),
        )
        nn.init.zeros_(self.from_context.weight)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) features and (B, E) context -> (B, O, Ho, Wo)."""
        expanded = context[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return conv2d(x, self.weight, self.bias, **self.geometry, groups=self.groups) + self.from_context(expanded)


class ScaleShiftConv2d(_Replacement):
    """A plain convolution whose output is scaled and shifted by image and channel (FiLM, Perez et al., 2018).

    It costs much less than offsets do.
    """

    def __init__(self, conv: nn.Conv2d, context_dim: int, generators: Generators) -> None:
        super().__init__(conv)
        self.groups = conv.groups
        self.scale_shift = ScaleShift(conv, context_dim, generators)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) features and (B, E) context -> (B, O, Ho, Wo)."""
        scale, shift = self.scale_shift(x, context)[:, :, None, None].chunk(2, dim=1)
        return conv2d(x, self.weight, self.bias, **self.geometry, groups=self.groups) * (1 + scale) + shift


class ScaleShift(nn.Module):
    """[GAP(x), context] -> FC, norm, ReLU, FC -> scale - 1 and shift, through C / 4 hidden units."""

    is_generator = True  # for the optimizer, which may train it at another rate

    def __init__(self, conv: nn.Conv2d, context_dim: int, generators: Generators) -> None:
        super().__init__()
        width = max(conv.in_channels // 4, generators.width)
        self.pool = GlobalMean()
        self.hidden = _hidden_layer(conv.in_channels + context_dim, width, generators.norm)
        self.out = nn.Linear(width, 2 * conv.out_channels, bias=generators.bias)
        _zero(self.out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, 2 O)."""
        return self.out(self.hidden(_joined(self.pool(x), context)))


class DeformableConv2d(_Replacement):
    """Deformable convolution v2 (Zhu et al., 2019; table 4, a4): offsets and mask by one convolution of the features.

    The mask starts at 1 instead of 1/2, so that a fresh layer equals the plain one.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.taps = self.weight[0, 0].numel()
        self.offset_mask = nn.Conv2d(conv.in_channels, 3 * self.taps, **_options_of(conv))
        _zero(self.offset_mask)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, Ho, Wo)."""
        x = as_conv2d_takes(x)
        offset, mask = at_least_float32(self.offset_mask(x)).split([2 * self.taps, self.taps], dim=1)
        return contextual_conv2d(
            x, self.weight, self.bias, sampling_offset=offset, mask=2 * mask.sigmoid(), **self.geometry
        )


def _options_of(conv: nn.Conv2d) -> dict[str, Any]:
    """For a convolution of the same kernel size and steps."""
    return dict(kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding, dilation=conv.dilation)


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def operators(model: nn.Module, device: torch.device) -> str:
    """Who computes the model's contextual convolutions in this process: cpp, triton or torch; empty if it has none.

    Raises:
        UserError: CONTEXTUAL_CNN_OPS names what cannot.
    """
    has_any = any(isinstance(module, ContextualConv2d | DeformableConv2d) for module in model.modules())
    return implementation_on(device) if has_any else ""

"""Contextual ConvNeXt (section 3.3): timm's ConvNeXt with contextual depthwise convolutions."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn

from contextual_cnn.models.context_options import ContextOptions, take_context_options
from contextual_cnn.models.contextual_model import (
    ContextualBlock,
    ContextualModel,
)
from contextual_cnn.models.weights import checkpoint_filter_fn

# depths and dims as timm's plain twins, which is what lets plain weights load
_SIZES: dict[str, dict[str, Any]] = {
    "contextual_convnext_atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), conv_mlp=True),
    "contextual_convnext_tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "contextual_convnext_small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "contextual_convnext_base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
}


class ContextualConvNeXt(ContextualModel):
    """ConvNeXt in which the likely classes after each stage modulate the convolutions of the next.

    Args:
        context: what may be chosen about the context; a kind of convolution that has one.
        num_classes, context_classes, drop_rate: see `ContextualModel`.
        backbone: what timm's ConvNeXt takes.
    """

    def __init__(
        self,
        context: ContextOptions,
        num_classes: int = 1000,
        context_classes: int = 1000,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **backbone: Any,
    ) -> None:
        plain = ConvNeXt(num_classes=0, **backbone)
        super().__init__(
            plain.feature_info,
            context,
            in_chans=plain.in_chans,
            num_classes=num_classes,
            context_classes=context_classes,
            drop_rate=drop_rate,
        )
        self.stem, self.stages = plain.stem, plain.stages
        for stage in context.contextual_stages:
            blocks: Any = self.stages[stage - 1].blocks
            for i in range(0, len(blocks), context.contextual_every):
                blocks[i] = ContextualConvNeXtBlock(blocks[i], context.replace(blocks[i].conv_dw))
        self.to(device=device, dtype=dtype)

    group_matcher = ConvNeXt.group_matcher  # the class context is matched by nothing, which puts it with the head

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/4, W/4)."""
        return self.stem(images)

    def stage_blocks(self) -> Sequence[Iterable[nn.Module]]:
        """A stage's downsampling and its blocks."""
        return [[stage.downsample, *stage.blocks] for stage in cast(Iterable[ConvNeXtStage], self.stages)]

    def keep_stages(self, count: int) -> None:
        self.stages = self.stages[:count]


class ContextualConvNeXtBlock(ContextualBlock):
    """A ConvNeXt block whose depthwise convolution takes a context; every other layer is the plain block's own."""

    def __init__(self, block: ConvNeXtBlock, conv: nn.Module) -> None:
        super().__init__()
        self.conv_dw = conv
        self.norm, self.mlp, self.gamma = block.norm, block.mlp, block.gamma
        self.drop_path, self.use_conv_mlp = block.drop_path, block.use_conv_mlp

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B, D) -> (B, C, H, W)."""
        y = self.conv_dw(x, context)
        if self.use_conv_mlp:
            y = self.mlp(self.norm(y))
        else:
            y = self.mlp(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)


def _plain_convnext(context: ContextOptions, **backbone: Any) -> ConvNeXt:
    """The plain twin with other convolutions in the same places: the ablations that have no context."""
    model = ConvNeXt(**backbone)
    for stage in context.contextual_stages:
        blocks: Any = model.stages[stage - 1].blocks
        for block in blocks[:: context.contextual_every]:
            block.conv_dw = context.replace(block.conv_dw)
    return model


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    context, others = take_context_options(kwargs, contextual_every=3)
    kind = ContextualConvNeXt if context.has_context else _plain_convnext
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        context=context,
        **{**_SIZES[variant], **others},
    )


# No weights are published; the entries give timm's tools the input they expect.
default_cfgs = generate_default_cfgs(
    {
        name: dict(
            url="",
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            first_conv="stem.0",
            # What is named here timm's loader drops from weights for features; these depend on the class embeddings.
            # Those of another number of classes are dropped by the filter.
            classifier=(),
            license="apache-2.0",
            paper_name="Contextual Convolutional Networks",
        )
        for name in _SIZES
    }
)


@register_model
def contextual_convnext_atto(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """For small machines and small images; not in the paper."""
    return _create("contextual_convnext_atto", pretrained, **kwargs)


@register_model
def contextual_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Contextual ConvNeXt-T."""
    return _create("contextual_convnext_tiny", pretrained, **kwargs)


@register_model
def contextual_convnext_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Contextual ConvNeXt-S."""
    return _create("contextual_convnext_small", pretrained, **kwargs)


@register_model
def contextual_convnext_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Contextual ConvNeXt-B."""
    return _create("contextual_convnext_base", pretrained, **kwargs)

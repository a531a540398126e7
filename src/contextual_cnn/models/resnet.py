"""Contextual ResNets (section 4.2, the frames of videos; section 4.3, the ablations): timm's, with contextual 3x3
convolutions.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from contextual_cnn.models.context_options import ContextOptions, take_context_options
from contextual_cnn.models.contextual_model import (
    STAGES,
    ContextualBlock,
    ContextualModel,
)
from contextual_cnn.models.weights import checkpoint_filter_fn

_LAYERS = {"contextual_resnet50": (3, 4, 6, 3), "contextual_resnet101": (3, 4, 23, 3)}


class ContextualResNet(ContextualModel):
    """ResNet in which the likely classes after each stage modulate the 3x3 convolutions of the next.

    A weight offset is shared by all output channels of its convolution.

    Args:
        context: what may be chosen about the context; a kind of convolution that has one.
        num_classes, context_classes, drop_rate: see `ContextualModel`.
        backbone: what timm's ResNet takes.
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
        plain = ResNet(num_classes=0, **backbone)
        super().__init__(
            plain.feature_info,
            context,
            in_chans=backbone.get("in_chans", 3),
            num_classes=num_classes,
            context_classes=context_classes,
            drop_rate=drop_rate,
            convolved=[_first_block(plain, stage).conv2.in_channels for stage in range(1, STAGES + 1)],
        )
        self.conv1, self.bn1, self.act1, self.maxpool = plain.conv1, plain.bn1, plain.act1, plain.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = plain.layer1, plain.layer2, plain.layer3, plain.layer4
        for stage in context.contextual_stages:
            blocks = getattr(self, f"layer{stage}")
            for i in range(0, len(blocks), context.contextual_every):
                blocks[i] = ContextualBottleneck(blocks[i], context.replace(blocks[i].conv2))
        self.to(device=device, dtype=dtype)

    group_matcher = ResNet.group_matcher  # the class context is matched by nothing, which puts it with the head

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/2, W/2)."""
        return self.act1(self.bn1(self.conv1(images)))

    def stage_blocks(self) -> Sequence[Iterable[nn.Module]]:
        """The four layers' blocks; the first of a layer downsamples, that of layer 1 after the pooling."""
        first, *others = (getattr(self, f"layer{stage}") for stage in range(1, STAGES + 1))
        return [(self.maxpool, *first), *others]

    def keep_stages(self, count: int) -> None:
        for stage in range(count + 1, STAGES + 1):
            setattr(self, f"layer{stage}", nn.Sequential())


def _first_block(model: ResNet, stage: int) -> Bottleneck:
    return cast(Bottleneck, model.get_submodule(f"layer{stage}.0"))


class ContextualBottleneck(ContextualBlock):
    """A bottleneck block whose 3x3 convolution takes a context; every other layer is the plain block's own."""

    def __init__(self, block: Bottleneck, conv: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = block.conv1, block.bn1, block.act1
        self.conv2, self.bn2, self.act2 = conv, block.bn2, block.act2
        self.conv3, self.bn3, self.act3 = block.conv3, block.bn3, block.act3
        assert block.aa is not None  # at least an Identity
        self.drop_block, self.aa, self.se = block.drop_block, block.aa, block.se
        self.drop_path, self.downsample = block.drop_path, block.downsample

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B, D) -> (B, C', H', W')."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y, context))
        y = self.aa(self.act2(self.drop_block(y)))
        y = self.bn3(self.conv3(y))
        for branch in (self.se, self.drop_path):
            y = branch(y) if branch is not None else y
        return self.act3(y + (self.downsample(x) if self.downsample is not None else x))


def _plain_resnet(context: ContextOptions, **backbone: Any) -> ResNet:
    """The plain twin with other convolutions in the same places: the ablations that have no context."""
    model = ResNet(**backbone)
    for stage in context.contextual_stages:
        for block in getattr(model, f"layer{stage}")[:: context.contextual_every]:
            block.conv2 = context.replace(block.conv2)
    return model


# No weights are published; the entry gives timm's tools the input they expect.
default_cfgs = generate_default_cfgs(
    {
        name: dict(
            url="",
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.95,
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            first_conv="conv1",
            classifier=(),  # see convnext.py
            license="apache-2.0",
            paper_name="Contextual Convolutional Networks",
        )
        for name in _LAYERS
    }
)


@register_model
def contextual_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Contextual ResNet-50, and with another `convolution` every row of the paper's ablations."""
    return _create("contextual_resnet50", pretrained, **kwargs)


@register_model
def contextual_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Contextual ResNet-101."""
    return _create("contextual_resnet101", pretrained, **kwargs)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    context, others = take_context_options(kwargs, contextual_every=1)
    kind = ContextualResNet if context.has_context else _plain_resnet
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter"),
        context=context,
        **{**dict(block=Bottleneck, layers=_LAYERS[variant]), **others},
    )

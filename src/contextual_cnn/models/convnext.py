"""Contextual ConvNeXt (section 3): timm's ConvNeXt stem and stages, contextual convolutions, staged classification.

    stem -> stage 1 -> classify, merge -> stage 2 -> classify, merge -> ... -> stage 4 -> classify

Shapes: B images, N classes, k classes of a shortlist, E embedding size.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from contextual_cnn.contracts import StagedScores
from contextual_cnn.models.class_context import (
    ClassEmbeddings,
    Merging,
    Projection,
    check_class_counts,
    default_class_counts,
)
from contextual_cnn.models.contextual_conv import ContextualConv2d

Selection = Literal["rerank", "reduce"]

# depths and dims as timm's plain twins, which is what lets plain weights load
_SIZES = {
    "contextual_convnext_atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), conv_mlp=True),
    "contextual_convnext_tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "contextual_convnext_small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "contextual_convnext_base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
}


class ContextualConvNeXt(nn.Module):
    """ConvNeXt in which the likely classes after each stage modulate the convolutions of the next.

    Args:
        num_classes: N1.
        class_counts: (N2, N3, N4), the classes kept after stages 1, 2 and 3; None scales the paper's
            (500, 200, 50) of 1000.
        embedding_dim: E = d = 256 in the paper.
        selection: what a stage classifies. "reduce" (the paper): only what the stage before kept; a class once
            dropped never returns. "rerank" (the released code's later form): all classes, at every stage; only the
            context uses the shortlist. See docs/staged-loss.md for why rerank is the default.
        contextual_every: one of every so many blocks of stages 2 to 4 is contextual, from the first (paper: 3).
        mask: the released code's sigmoid factor per tap (not in the paper).
        depths, dims, drop_path_rate, ls_init_value, conv_mlp, in_chans, drop_rate: as timm's ConvNeXt;
            drop_rate acts before the last stage's projection.

    Raises:
        ValueError: class counts that do not fit num_classes.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        class_counts: Sequence[int] | None = None,
        embedding_dim: int = 256,
        selection: Selection = "rerank",
        contextual_every: int = 3,
        mask: bool = False,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        ls_init_value: float | None = 1e-6,
        conv_mlp: bool = False,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_counts = tuple(class_counts) if class_counts is not None else default_class_counts(num_classes)
        check_class_counts(num_classes, self.class_counts)
        if selection not in ("rerank", "reduce"):
            raise ValueError(f"selection must be 'rerank' or 'reduce', got {selection!r}")
        self.selection = selection

        plain = ConvNeXt(
            in_chans=in_chans,
            num_classes=0,
            depths=tuple(depths),
            dims=tuple(dims),
            drop_path_rate=drop_path_rate,
            ls_init_value=ls_init_value,
            conv_mlp=conv_mlp,
        )
        self.stem, self.stages = plain.stem, plain.stages
        self.num_features, self.feature_info = plain.num_features, plain.feature_info
        for stage in self.stages[1:]:
            for i in range(0, len(stage.blocks), contextual_every):
                stage.blocks[i] = ContextualBlock(stage.blocks[i], embedding_dim, mask)

        self.class_embeddings = ClassEmbeddings(num_classes, embedding_dim)
        self.projections = nn.ModuleList(Projection(channels, embedding_dim) for channels in dims)
        self.mergings = nn.ModuleList(Merging(embedding_dim) for _ in self.class_counts)
        self.head_drop = nn.Dropout(drop_rate)

    def forward(self, images: Tensor, staged: bool | None = None) -> StagedScores | Tensor:
        """(B, 3, H, W) -> the scores of every stage in training; dense (B, N) logits in eval, as any timm model.

        Args:
            staged: True or False to choose regardless of the mode.
        """
        scores = self.forward_stages(images)
        return scores if (self.training if staged is None else staged) else scores.logits[-1]

    def forward_stages(self, images: Tensor) -> StagedScores:
        """(B, 3, H, W) -> logits of the four stages and the shortlists of the first three."""
        return self._run(images)[1]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/32, W/32), the map that the last stage classifies."""
        return self._run(images)[0]

    def _run(self, images: Tensor) -> tuple[Tensor, StagedScores]:
        """Features -> scores -> shortlist -> context -> the next stage's features, four times."""
        x = self.stem(images)
        context = None
        logits, shortlists = [], []
        for i, stage in enumerate(self.stages):
            x = _forward_stage(stage, x, context)
            logits.append(self._classify(i, x, shortlists))
            if i < len(self.class_counts):
                # sorted=False: the context is a mean, which has no order
                shortlists.append(logits[i].detach().topk(self.class_counts[i], dim=1, sorted=False).indices)
                context = self.mergings[i](self.class_embeddings.weight, shortlists[i])  # (B, E)
        return x, StagedScores(tuple(logits), tuple(shortlists))

    def _classify(self, i: int, x: Tensor, shortlists: list[Tensor]) -> Tensor:
        """Stage i's (B, N) logits; with "reduce", -inf where the stage before dropped the class."""
        x = self.head_drop(x) if i == len(self.stages) - 1 else x
        scores = self.class_embeddings(self.projections[i](x))
        if self.selection == "rerank" or not shortlists:
            return scores
        dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(1, shortlists[-1], False)
        return scores.masked_fill(dropped, -torch.inf)

    def no_weight_decay(self) -> set[str]:
        """What timm's optimizer factory spares besides biases and norms (offset biases are biases)."""
        return {"class_embeddings.weight", "class_embeddings.log_inverse_temperature"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks' activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable


class ContextualBlock(nn.Module):
    """A ConvNeXt block whose depthwise convolution is contextual; every other layer is the plain block's own.

    The names are the plain block's, so that plain weights load.
    """

    def __init__(self, block: ConvNeXtBlock, context_dim: int, mask: bool) -> None:
        super().__init__()
        conv = block.conv_dw
        self.conv_dw = ContextualConv2d(conv.in_channels, context_dim, conv.kernel_size[0], mask=mask)
        self.norm, self.mlp, self.gamma = block.norm, block.mlp, block.gamma
        self.drop_path, self.use_conv_mlp = block.drop_path, block.use_conv_mlp

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C, H, W)."""
        y = self.conv_dw(x, context)
        if self.use_conv_mlp:
            y = self.mlp(self.norm(y))
        else:
            y = self.mlp(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)


def _forward_stage(stage: ConvNeXtStage, x: Tensor, context: Tensor | None) -> Tensor:
    x = stage.downsample(x)
    for block in stage.blocks:
        inputs = (x, context) if isinstance(block, ContextualBlock) else (x,)
        x = checkpoint(block, *inputs, use_reentrant=False) if _recomputes(stage) else block(*inputs)
    return x


def _recomputes(stage: ConvNeXtStage) -> bool:
    return stage.grad_checkpointing and stage.training and torch.is_grad_enabled()


def _create(variant: str, pretrained: bool, **kwargs) -> ContextualConvNeXt:
    return build_model_with_cfg(ContextualConvNeXt, variant, pretrained, **{**_SIZES[variant], **kwargs})


# No weights are published; the entries give timm's tools the input they expect.
default_cfgs = generate_default_cfgs(
    {
        name: dict(
            url="",
            num_classes=1000,
            input_size=(3, 224, 224),
            crop_pct=0.875,
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            first_conv="stem.0",
            classifier="class_embeddings",
        )
        for name in _SIZES
    }
)


@register_model
def contextual_convnext_atto(pretrained: bool = False, **kwargs) -> ContextualConvNeXt:
    """For small machines and small images; not in the paper."""
    return _create("contextual_convnext_atto", pretrained, **kwargs)


@register_model
def contextual_convnext_tiny(pretrained: bool = False, **kwargs) -> ContextualConvNeXt:
    """Contextual ConvNeXt-T."""
    return _create("contextual_convnext_tiny", pretrained, **kwargs)


@register_model
def contextual_convnext_small(pretrained: bool = False, **kwargs) -> ContextualConvNeXt:
    """Contextual ConvNeXt-S."""
    return _create("contextual_convnext_small", pretrained, **kwargs)


@register_model
def contextual_convnext_base(pretrained: bool = False, **kwargs) -> ContextualConvNeXt:
    """Contextual ConvNeXt-B."""
    return _create("contextual_convnext_base", pretrained, **kwargs)

"""What contextual models share (section 3.1): stages with a classification between them, whichever the backbone.

    stem -> stage 1 -> classify, merge -> stage 2 -> classify, merge -> ... -> stage 4 -> classify

Shapes: B images, N classes, k classes of a shortlist, E embedding size, C channels of a stage.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
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
from contextual_cnn.models.contextual_conv import WITHOUT_CONTEXT

Selection = Literal["rerank", "reduce"]
STAGES = 4


class ContextualBlock(nn.Module):
    """A block of a backbone that takes a context besides the features; otherwise the plain block, names included."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C', H', W')."""
        raise NotImplementedError


class ContextualModel(nn.Module):
    """A backbone of four stages in which the likely classes after each modulate the convolutions of the next.

    A subclass sets up the backbone's layers under their plain names and tells them by `forward_stem` and
    `stage_blocks`.

    Args:
        channels: of each stage's output.
        num_classes: N1.
        class_counts: (N2, N3, N4), the classes that stages 2, 3 and 4 consider; None scales the paper's
            (500, 200, 50) of 1000.
        embedding_dim: E = d = 256 in the paper (table 6).
        selection: what a stage classifies. "reduce" (the paper): only what the stage before kept; a class once
            dropped never returns. "rerank" (the released code's later form): all classes, at every stage; only the
            context uses the shortlist. See docs/staged-loss.md for why rerank is the default.
        contextual_stages: those whose convolutions are modulated (paper: 2, 3, 4; table 6). A classification comes
            before each, but before stage 1, whose context is merged from all classes, and after the last stage.
        drop_rate: dropout before the last stage's projection.

    Raises:
        ValueError: class counts that do not fit num_classes, or stages that there are not.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        num_classes: int,
        class_counts: Sequence[int] | None,
        embedding_dim: int,
        selection: Selection,
        contextual_stages: Sequence[int],
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_counts = tuple(class_counts) if class_counts is not None else default_class_counts(num_classes)
        check_class_counts(num_classes, self.class_counts)
        if selection not in ("rerank", "reduce"):
            raise ValueError(f"selection must be 'rerank' or 'reduce', got {selection!r}")
        self.selection = selection
        self.contextual_stages = tuple(contextual_stages)
        if not self.contextual_stages or sorted(set(contextual_stages) & {1, 2, 3, 4}) != list(contextual_stages):
            raise ValueError(f"contextual_stages must be some of 1, 2, 3, 4 in order, got {list(contextual_stages)}")
        classified = [stage - 1 for stage in contextual_stages if stage > 1] + [STAGES]
        # Keyed by the stage that they follow or precede
        self.projections = nn.ModuleDict({str(i): Projection(channels[i - 1], embedding_dim) for i in classified})
        self.mergings = nn.ModuleDict({str(i): Merging(embedding_dim) for i in contextual_stages})
        self.class_embeddings = ClassEmbeddings(num_classes, embedding_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.grad_checkpointing = False

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> what stage 1 takes."""
        raise NotImplementedError

    def stage_blocks(self) -> Iterable[Iterable[nn.Module]]:
        """The modules of each stage, to be called one after the other; those that are ContextualBlocks with context."""
        raise NotImplementedError

    @property
    def shortlist_sizes(self) -> tuple[int, ...]:
        """k of each classification but the last."""
        return tuple(self.class_counts[stage - 2] for stage in self.contextual_stages if stage > 1)

    def forward(self, images: Tensor, staged: bool | None = None) -> StagedScores | Tensor:
        """(B, 3, H, W) -> the scores of every stage in training; dense (B, N) logits in eval, as any timm model.

        Args:
            staged: True or False to choose regardless of the mode.
        """
        scores = self.forward_stages(images)
        return scores if (self.training if staged is None else staged) else scores.logits[-1]

    def forward_stages(self, images: Tensor) -> StagedScores:
        """(B, 3, H, W) -> logits of all classifications and the shortlists of all but the last."""
        return self._run(images)[1]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/32, W/32), the map that the last stage classifies."""
        return self._run(images)[0]

    def _run(self, images: Tensor) -> tuple[Tensor, StagedScores]:
        """Features -> scores -> shortlist -> context -> the next stage's features."""
        x = self.forward_stem(images)
        logits, shortlists = [], []
        for stage, blocks in enumerate(self.stage_blocks(), start=1):
            context = self._context(stage, x, shortlists) if stage in self.contextual_stages else None
            for block in blocks:
                x = self._forward_block(block, x, context)
            if str(stage) in self.projections:
                logits.append(self._classify(stage, x, shortlists))
            if stage + 1 in self.contextual_stages:
                # sorted=False: the context is a mean, which has no order
                best = logits[-1].detach().topk(self.class_counts[stage - 1], dim=1, sorted=False)
                shortlists.append(best.indices)
        return x, StagedScores(tuple(logits), tuple(shortlists))

    def _context(self, stage: int, x: Tensor, shortlists: list[Tensor]) -> Tensor:
        """(B, E), merged from the classes that the stage considers; before stage 1 those are all."""
        everything = torch.arange(self.num_classes, device=x.device).expand(len(x), -1)
        shortlist = shortlists[-1] if stage > 1 else everything
        return self.mergings[str(stage)](self.class_embeddings.weight, shortlist)

    def _classify(self, stage: int, x: Tensor, shortlists: list[Tensor]) -> Tensor:
        """The stage's (B, N) logits; with "reduce", -inf where the classification before dropped the class."""
        x = self.head_drop(x) if stage == STAGES else x
        scores = self.class_embeddings(self.projections[str(stage)](x))
        if self.selection == "rerank" or not shortlists:
            return scores
        dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(1, shortlists[-1], False)
        return scores.masked_fill(dropped, -torch.inf)

    def _forward_block(self, block: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        inputs = (x, context) if isinstance(block, ContextualBlock) else (x,)
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def no_weight_decay(self) -> set[str]:
        """What timm's optimizer factory spares besides biases and norms (offset biases are biases)."""
        return {"class_embeddings.weight", "class_embeddings.log_inverse_temperature"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks' activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable


def takes_context(options: dict) -> bool:
    """Whether a model of these options has a context: the ablations without one are plain models, head and all."""
    return options.get("convolution", "contextual") not in WITHOUT_CONTEXT


def without_context_options(options: dict) -> dict:
    """What is left for a plain model."""
    context = ("class_counts", "embedding_dim", "selection", "mask")
    return {key: value for key, value in options.items() if key not in context}

"""What may be chosen about the context of a model, whichever its backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from torch import nn

from contextual_cnn.contracts import STAGES
from contextual_cnn.models.contextual_conv import Generators, replace_convolution
from contextual_cnn.settings.model import ContextInit, ContextLayers, ContextOf, Convolution, Merge, Norm, Selection

WITHOUT_CONTEXT = ("without_prior", "deformable", "plain")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "selection": get_args(Selection),
    "projection_norm": get_args(Norm),
    "context_norm": get_args(Norm),
    "generator_norm": get_args(Norm),
    "context_init": get_args(ContextInit),
    "merge": get_args(Merge),
    "context_of": get_args(ContextOf),
    "convolution": get_args(Convolution),
    "context_layers": get_args(ContextLayers),
}


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """Keywords that every contextual model takes.

    class_counts: (N2, N3, N4), the classes that stages 2, 3 and 4 consider; None scales the paper's (500, 200, 50) of
        1000.
    embedding_dim: E = d = 256 in the paper (table 6).
    projection_norm: between the layers of a projection, see `Projection`.
    context_norm: the last of merging, see `Merging`.
    context_init: see `initialize`.
    merge: how the classes of a shortlist weigh in its context. "mean" (the paper): all the same. "scores": by the
        softmax of the stage's logits over the shortlist.
    context_of: what is merged. "shortlist" is the model: each image's own, of a video each frame's. "clip" is for
        videos: one shortlist for all frames of a clip, by the mean of their scores. Two are controls, for experiments
        about the context. "told" puts the true class into the shortlist, in place of the least likely where it is
        missing, in training and in evaluations: the most that a context can tell. "blind" merges all classes for every
        image: a context that tells nothing.
    selection: what a stage classifies. "reduce" (the paper): only what the stage before kept; a class once dropped
        never returns. "rerank" (the released code's later form): all classes, at every stage; only the context uses
        the shortlist. See docs/staged-loss.md for why rerank is the default.
    contextual_stages: those whose convolutions are modulated (paper: 2, 3, 4; table 6). A classification comes before
        each, but before stage 1, whose context is merged from all classes, and after the last stage.
    contextual_every: N makes the first of every N blocks of a contextual stage contextual (the paper: 3 for ConvNeXt,
        nothing for ResNet; the released ResNet's default is 2).
    convolution, mask, generator_norm, generator_width, offset_bias: see `replace_convolution` and `Generators`.
    context_layers: widths and generators. "paper" (which leaves a projection's hidden width open): projections have C
        hidden units, contexts are E wide, and sampling offsets come from depthwise generators. "released" (the authors'
        code) goes by c, the channels of the stage's contextual convolutions: C in a ConvNeXt, C/4 in a ResNet.
        Projections have c hidden units, contexts are c/2 wide, and generators are dense, see `TapMaps`. Norms, mask
        and initialisation have keys of their own; the experiments released_t and released_r50 set all of them.

    Raises:
        ValueError: a choice that there is not.
    """

    class_counts: Sequence[int] | None = None
    embedding_dim: int = 256
    projection_norm: Norm = "batch"
    context_norm: Norm = "layer"
    context_init: ContextInit = "uniform"
    merge: Merge = "mean"
    context_of: ContextOf = "shortlist"
    selection: Selection = "rerank"
    contextual_stages: Sequence[int] = (2, 3, 4)
    contextual_every: int
    convolution: Convolution = "contextual"
    mask: bool = False
    generator_norm: Norm = "layer"
    generator_width: int = 1
    offset_bias: bool = True
    context_layers: ContextLayers = "paper"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if self.context_of != "shortlist" and not self.has_context:
            raise ValueError(f"context_of={self.context_of!r}: convolution={self.convolution!r} has no context")
        stages = list(self.contextual_stages)
        if not stages or sorted(set(stages) & set(range(1, STAGES + 1))) != stages:
            raise ValueError(f"contextual_stages must be some of 1, 2, 3, 4 in order, got {stages}")

    @property
    def has_context(self) -> bool:
        """Whether a model of these options has one: the ablations without are plain models, head and all."""
        return self.convolution not in WITHOUT_CONTEXT

    @property
    def generators(self) -> Generators:
        """Of the offsets' generators."""
        return Generators(self.generator_norm, self.generator_width, self.offset_bias, self.context_layers)

    def context_dim(self, channels: int) -> int:
        """Width of the context that a convolution with this many channels takes."""
        return channels // 2 if self.context_layers == "released" else self.embedding_dim

    def replace(self, conv: nn.Conv2d) -> nn.Module:
        """What takes the place of a plain convolution."""
        context_dim = self.context_dim(conv.in_channels) if self.has_context else 0
        return replace_convolution(conv, self.convolution, context_dim, self.generators, self.mask)


CONTEXT_KEYS = tuple(option.name for option in fields(ContextOptions))


def take_context_options(keywords: Mapping[str, Any], contextual_every: int) -> tuple[ContextOptions, dict[str, Any]]:
    """A model's keywords as its context options, and all others.

    Args:
        contextual_every: the backbone's default.
    """
    given = {key: value for key, value in keywords.items() if key in CONTEXT_KEYS}
    others = {key: value for key, value in keywords.items() if key not in CONTEXT_KEYS}
    return ContextOptions(**{"contextual_every": contextual_every} | given), others

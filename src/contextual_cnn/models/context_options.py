"""What may be chosen about the context of a model, whichever its backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from contextual_cnn.contracts import STAGES
from contextual_cnn.settings.model import Convolution, ProjectionNorm, Selection

WITHOUT_CONTEXT = ("without_prior", "deformable", "plain")


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """Keywords that every contextual model takes.

    class_counts: (N2, N3, N4), the classes that stages 2, 3 and 4 consider; None scales the paper's (500, 200, 50) of
        1000.
    embedding_dim: E = d = 256 in the paper (table 6).
    projection_norm: between the layers of a projection, see `Projection`.
    selection: what a stage classifies. "reduce" (the paper): only what the stage before kept; a class once dropped
        never returns. "rerank" (the released code's later form): all classes, at every stage; only the context uses
        the shortlist. See docs/staged-loss.md for why rerank is the default.
    contextual_stages: those whose convolutions are modulated (paper: 2, 3, 4; table 6). A classification comes before
        each, but before stage 1, whose context is merged from all classes, and after the last stage.
    contextual_every: N makes the first of every N blocks of a contextual stage contextual (the paper: 3 for ConvNeXt,
        nothing for ResNet; the released ResNet's default is 2).
    convolution, mask: see `replace_convolution`.

    Raises:
        ValueError: a choice that there is not.
    """

    class_counts: Sequence[int] | None = None
    embedding_dim: int = 256
    projection_norm: ProjectionNorm = "batch"
    selection: Selection = "rerank"
    contextual_stages: Sequence[int] = (2, 3, 4)
    contextual_every: int
    convolution: Convolution = "contextual"
    mask: bool = False

    def __post_init__(self) -> None:
        if self.selection not in ("rerank", "reduce"):
            raise ValueError(f"selection must be 'rerank' or 'reduce', got {self.selection!r}")
        if self.projection_norm not in ("batch", "layer"):
            raise ValueError(f"projection_norm must be 'batch' or 'layer', got {self.projection_norm!r}")
        stages = list(self.contextual_stages)
        if not stages or sorted(set(stages) & set(range(1, STAGES + 1))) != stages:
            raise ValueError(f"contextual_stages must be some of 1, 2, 3, 4 in order, got {stages}")

    @property
    def has_context(self) -> bool:
        """Whether a model of these options has one: the ablations without are plain models, head and all."""
        return self.convolution not in WITHOUT_CONTEXT


CONTEXT_KEYS = tuple(option.name for option in fields(ContextOptions))


def take_context_options(keywords: Mapping[str, Any], contextual_every: int) -> tuple[ContextOptions, dict[str, Any]]:
    """A model's keywords as its context options, and all others.

    Args:
        contextual_every: the backbone's default.
    """
    given = {key: value for key, value in keywords.items() if key in CONTEXT_KEYS}
    others = {key: value for key, value in keywords.items() if key not in CONTEXT_KEYS}
    return ContextOptions(**{"contextual_every": contextual_every} | given), others

"""What crosses a boundary between the parts: small, typed, and the same whichever model or loader is used.

Shapes: B images, N classes, k classes of a shortlist.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

STAGES = 4  # of every backbone (section 3.1)


class Batch(NamedTuple):
    """Images ready for the model and their targets.

    images: (B, 3, H, W) float, normalised, channels_last.
    targets: (B,) int64 class indices, or (B, N) float probabilities after mixing or smoothing. In an evaluation -1 is
        the target of an image that cannot be read or decoded: no answer is right.
    replaced: images of a training batch that stand in for others, which cannot be used.
    """

    images: Tensor
    targets: Tensor
    replaced: int = 0

    @property
    def size(self) -> int:
        return len(self.targets)


class TimmModel(Protocol):
    """What a model of timm has beside nn.Module, whose own type knows tensors and modules only; to be cast to."""

    pretrained_cfg: Mapping[str, Any]

    def get_classifier(self) -> nn.Module: ...

    def set_grad_checkpointing(self, enable: bool) -> None: ...


class StagedScores(NamedTuple):
    """The classification of every stage, first to last.

    logits: per stage (B, N) float32, scores divided by the temperature; -inf marks a class that the
        stage no longer considers.
    shortlists: per stage but the last (B, k) int64, the classes whose embeddings make the next stage's context. Of
        videos (B, F, k), for each of F frames.
    stages: the stage that each classification follows, counted from 1.

    A plain model has one classification, after stage 4, and no shortlist: its loss is comparable with the last loss
    of a contextual model.
    """

    logits: tuple[Tensor, ...]
    shortlists: tuple[Tensor, ...]
    stages: tuple[int, ...]

    @classmethod
    def of(cls, output: "StagedScores | Tensor") -> "StagedScores":
        """Takes whatever a model returns: staged scores as they are, plain (B, N) logits as those after stage 4."""
        return output if isinstance(output, StagedScores) else cls((at_least_float32(output),), (), (STAGES,))


class StagedLoss(NamedTuple):
    """total: scalar to differentiate. parts: detached scalars by name, in the order in which they are logged."""

    total: Tensor
    parts: dict[str, Tensor]


def at_least_float32(values: Tensor) -> Tensor:
    """What bfloat16 is too coarse for. float64 stays, so that a check in float64 is one."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def is_considered(logits: Tensor) -> Tensor:
    """(B, N) bool: True unless the stage dropped the class. A NaN counts as considered, so that it shows."""
    return logits != -torch.inf


def stage_name(measure: str, stage: int) -> str:
    """The name of a measure taken after a stage: recall_stage3. No other function makes such a name."""
    return f"{measure}_stage{stage}"


def by_stage(metrics: Mapping[str, T], measure: str) -> dict[int, T]:
    """The values whose names `stage_name` made, by stage, in ascending order."""
    names = {stage: stage_name(measure, stage) for stage in range(1, STAGES + 1)}
    return {stage: metrics[name] for stage, name in names.items() if name in metrics}

"""What crosses a boundary between the parts: small, typed, and the same whichever model or loader is used.

Shapes: B images, N classes, k classes of a shortlist.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images ready for the model and their targets.

    images: (B, 3, H, W) float, normalised, channels_last.
    targets: (B,) int64 class indices, or (B, N) float probabilities after mixing or smoothing. In an evaluation -1 is
        the target of an image that cannot be read or decoded: no answer is right.
    """

    images: Tensor
    targets: Tensor


class StagedScores(NamedTuple):
    """The classification of every stage, first to last.

    logits: per stage (B, N) float32, scores divided by the temperature; -inf marks a class that the
        stage no longer considers.
    shortlists: per stage but the last (B, k) int64, the classes whose embeddings make the next stage's context.

    A model without stages is the case of one stage and no shortlist.
    """

    logits: tuple[Tensor, ...]
    shortlists: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, output: "StagedScores | Tensor") -> "StagedScores":
        """Takes whatever a model returns: staged scores as they are, plain (B, N) logits as a single stage."""
        return output if isinstance(output, StagedScores) else cls((output.float(),))


class StagedLoss(NamedTuple):
    """total: scalar to differentiate. parts: detached scalars by name, in the order in which they are logged."""

    total: Tensor
    parts: dict[str, Tensor]


def is_considered(logits: Tensor) -> Tensor:
    """(B, N) bool: True unless the stage dropped the class. A NaN counts as considered, so that it shows."""
    return logits != -torch.inf

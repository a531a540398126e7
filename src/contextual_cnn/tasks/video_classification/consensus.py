"""From an image model's scores of frames to the scores of videos: the mean over a clip, then over a video's views.

Shapes: B videos, V views (clips and crops of a video), T frames of a view, N classes, k classes of a shortlist.
"""

from typing import Any

import torch
from torch import Tensor

from contextual_cnn.contracts import StagedScores
from contextual_cnn.task import Call


def of_videos(call: Call) -> Call:
    """A call of a model of images, as one of videos: (B, V, T, 3, H, W) -> what the model gives, for each video."""

    def scores_of(images: Tensor, told: Tensor | None = None, **options: Any) -> StagedScores:
        views, frames = images.shape[1:3]
        if told is not None:
            options["told"] = told.repeat_interleave(views * frames)
        return consensus(StagedScores.of(call(images.flatten(0, 2), **options)), views, frames)

    return scores_of


def consensus(scores: StagedScores, views: int, frames: int) -> StagedScores:
    """The scores of videos. Frames count equally, by their logits (TSM); views do, by their probabilities (mmaction2).

    A video's logits are its clip's if there is one view, and otherwise logarithms of the mean probabilities.

    Args:
        scores: of the frames: logits (B V T, N), shortlists (B V T, k).

    Returns:
        logits (B, N); shortlists (B, V T, k), each frame's own.
    """
    logits = tuple(_of_views(stage.unflatten(0, (-1, views, frames)).mean(dim=2)) for stage in scores.logits)
    shortlists = tuple(shortlist.unflatten(0, (-1, views * frames)) for shortlist in scores.shortlists)
    return StagedScores(logits, shortlists, scores.stages)


def _of_views(logits: Tensor) -> Tensor:
    """(B, V, N) -> (B, N)."""
    return logits[:, 0] if logits.shape[1] == 1 else torch.log_softmax(logits, dim=2).logsumexp(dim=1)

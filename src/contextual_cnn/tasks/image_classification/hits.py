"""How often the true class is among the best, and on the shortlists: counts that stay on the device.

Shapes: B images, N classes, k classes of a shortlist, F frames of a video.
"""

from torch import Tensor

from contextual_cnn.contracts import StagedScores, stage_name


def stage_hits(scores: StagedScores, labels: Tensor) -> dict[str, Tensor]:
    """How many images' true class is on the shortlist that each stage hands on: recall_stageS as counts.

    A video, whose frames have shortlists of their own, (B, F, k), counts by the share of the frames.

    Args:
        labels: (B,) int64.
    """
    return {
        stage_name("recall", stage): _counted((shortlist == labels.view(-1, *[1] * (shortlist.ndim - 1))).any(dim=-1))
        for stage, shortlist in zip(scores.stages[:-1], scores.shortlists, strict=True)
    }


def _counted(hits: Tensor) -> Tensor:
    """(B,) or (B, F) bool -> scalar, a number of images."""
    return hits.sum() if hits.ndim == 1 else hits.float().mean(dim=1).sum()


def top_hits(logits: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[str, Tensor]:
    """How many images' true class is among the k best: top1, top5 as counts. k is cut to the number of classes."""
    best = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices
    hits = best == labels.unsqueeze(1)
    return {f"top{k}": hits[:, :k].any(dim=1).sum() for k in ks}


def labels_of(targets: Tensor) -> Tensor:
    """(B,) class indices of hard targets as they are, of soft targets the class with the largest share."""
    return targets if targets.ndim == 1 else targets.argmax(dim=1)

"""How soon the true class is among the best of each stage: the curves behind the choice of N2, N3 and N4."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from contextual_cnn.analysis.style import STAGE_COLORS, figure
from contextual_cnn.contracts import StagedScores


def recall_curves(scored: Iterable[tuple[StagedScores, Tensor]]) -> dict[int, Tensor]:
    """By stage, (N,): the share of images whose true class is among the best m after it, for m of 1 to N.

    A true class is as far down as the classes with a higher logit, which favours it among equals; one that a stage
    no longer considers, or whose score is no number, is not found at any m.

    Args:
        scored: batches' scores and (B,) labels.
    """
    hits: dict[int, Tensor] = {}
    images = 0
    for scores, labels in scored:
        for stage, logits in zip(scores.stages, scores.logits, strict=True):
            counts = _rank_counts(logits, labels)
            hits[stage] = hits[stage] + counts if stage in hits else counts
        images += len(labels)
    return {stage: (counts.cumsum(dim=0) / images).cpu() for stage, counts in hits.items()}


def plot_recall(curves: Mapping[int, Tensor], shortlist_sizes: Mapping[int, int], title: str, path: Path) -> None:
    """A line for each classification; a dot where the shortlist for the next stage is cut.

    Args:
        curves: as `recall_curves` gives them.
        shortlist_sizes: by stage, of all classifications but the last.
    """
    m = torch.arange(1, len(next(iter(curves.values()))) + 1)
    with figure(path, 1, 1, (7, 5), title) as axes:
        axis = axes[0, 0]
        for stage, curve in curves.items():
            color, label = STAGE_COLORS[stage], f"after stage {stage}, top-1 {curve[0]:.1%}"
            if stage in shortlist_sizes:
                size = shortlist_sizes[stage]
                label += f", {curve[size - 1]:.1%} on the shortlist of {size}"
                axis.plot(size, 100 * curve[size - 1], "o", color=color, markersize=6, zorder=3)
            axis.plot(m, 100 * curve, color=color, linewidth=1.6, label=label)
        axis.set(xscale="log", xlabel="m", ylabel="true class among the best m, % of the val images")
        ticks = [tick for decade in (1, 10, 100, 1000, 10000) for tick in (decade, 2 * decade, 5 * decade)]
        axis.set_xticks([tick for tick in ticks if tick <= len(m)], minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axis.set_xlim(1, len(m))
        axis.figure.legend(frameon=False, loc="outside lower center")


def _rank_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,): how many images' true class has 0, 1, ... N - 1 classes above it."""
    true = logits.gather(1, labels.unsqueeze(1))
    above = (logits > true).sum(dim=1)[true.isfinite().squeeze(1)]
    return torch.bincount(above, minlength=logits.shape[1])

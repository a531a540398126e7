"""How soon the true class is among the best of each stage: the curves behind the choice of N2, N3 and N4."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from contextual_cnn.analysis.style import LINES, figure
from contextual_cnn.contracts import StagedScores


def recall_curves(scored: Iterable[tuple[StagedScores, Tensor]]) -> Tensor:
    """(S, N): of S classifications the share of images whose true class is among the best m, for m of 1 to N.

    A true class is as far down as the classes with a higher logit, which favours it among equals; one that a stage
    no longer considers, or whose score is no number, is not found at any m.

    Args:
        scored: batches' scores and (B,) labels.
    """
    hits, images = 0, 0
    for scores, labels in scored:
        hits = hits + torch.stack([_rank_counts(logits, labels) for logits in scores.logits])
        images += len(labels)
    return (hits.cumsum(dim=1) / images).cpu()


def plot_recall(curves: Tensor, stages: Sequence[int], shortlist_sizes: Sequence[int], title: str, path: Path) -> None:
    """A line for each classification; a dot where the shortlist for the next stage is cut.

    Args:
        curves: as `recall_curves` gives them.
        stages: after which stage each classification comes.
        shortlist_sizes: of all classifications but the last.
    """
    m = torch.arange(1, curves.shape[1] + 1)
    with figure(path, 1, 1, (7, 5), title) as axes:
        axis = axes[0, 0]
        for i, (curve, stage, color) in enumerate(zip(curves, stages, LINES, strict=False)):
            label = f"after stage {stage}, top-1 {curve[0]:.1%}"
            if i < len(shortlist_sizes):
                size = shortlist_sizes[i]
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

"""Which classes a model keeps from stage to stage, and with what scores."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from contextual_cnn.analysis.images import Images
from contextual_cnn.analysis.style import DROPPED, FADING, KEPT, TRUE, figure, short, show_image
from contextual_cnn.contracts import StagedScores

_BARS = 10


def plot_shortlists(images: Images, scores: StagedScores, classes: Sequence[str], path: Path) -> None:
    """A row for each image, a column for each classification: its best classes, by what becomes of them."""
    title = "The best classes after each stage: which go on the shortlist for the next stage's context"
    with figure(path, len(images.names), 1 + len(scores.stages), (2.7, 2.7), title) as axes:
        for b, row in enumerate(axes):
            label = images.labels[b]
            show_image(row[0], images.pixels[b], f"true: {short(classes[label])}" if label is not None else "")
            kept = [set(shortlist[b].tolist()) for shortlist in scores.shortlists]
            for i, (axis, stage) in enumerate(zip(row[1:], scores.stages, strict=True)):
                fates = kept[i:]
                count = f"keeps {len(fates[0])}" if fates else "decides"
                axis.set_title(f"after stage {stage}: {count}", fontsize=9)
                _plot_bars(axis, scores.logits[i][b], fates, label, classes)
        axes[0, 0].figure.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False)


def shown_classes(logits: Tensor, label: int | None, most: int = _BARS) -> list[int]:
    """The best of (N,) logits, best first; the true class takes the last place where it is not among them."""
    best = logits.topk(min(most, int(logits.isfinite().sum()))).indices.tolist()
    return best if label is None or label in best else [*best[: most - 1], label]


def rank(logits: Tensor, index: int) -> int:
    """The place of a class among (N,) logits, from 1."""
    return int((logits > logits[index]).sum()) + 1


def _plot_bars(
    axis: Axes, logits: Tensor, fates: Sequence[set[int]], label: int | None, classes: Sequence[str]
) -> None:
    shown = shown_classes(logits, label)
    probabilities = logits.softmax(dim=0)
    for place, index in enumerate(shown):
        axis.barh(place, probabilities[index].item(), color=_color(index, fates, shown), height=0.72)
    names = [short(classes[i], 16) for i in shown]
    if label in shown and rank(logits, label) > len(shown):
        names[-1] += f" (rank {rank(logits, label)})"
    axis.set_yticks(range(len(shown)), names, fontsize=7.5)
    for tick, index in zip(axis.get_yticklabels(), shown, strict=True):
        if index == label:
            tick.set(color="black", fontweight="bold", bbox=dict(facecolor=TRUE, edgecolor="none", pad=1.5))
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.set_xlabel("probability", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(3))


def _color(index: int, fates: Sequence[set[int]], shown: Sequence[int]) -> str:
    """By the shortlists from this stage on; at the last stage by the decision."""
    if not fates:
        return KEPT if index == shown[0] else DROPPED
    if index not in fates[0]:
        return DROPPED
    return KEPT if all(index in kept for kept in fates) else FADING


def _legend() -> list[Patch]:
    texts = (
        (KEPT, "stays to the last shortlist; decided for"),
        (FADING, "kept here, dropped later"),
        (DROPPED, "not on the shortlist"),
    )
    return [*(Patch(color=color, label=text) for color, text in texts), Patch(color=TRUE, label="true class")]

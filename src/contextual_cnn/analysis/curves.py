"""curves.png: a run at a glance, drawn from the rows of its metrics.jsonl."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from contextual_cnn.analysis.style import LINES, STAGE_COLORS, figure
from contextual_cnn.contracts import by_stage

Lines = dict[str, tuple[str, str]]  # label and colour by the metric's name

_ACCURACY: Lines = {
    "val/top1": ("val", LINES[0]),
    "val_ema/top1": ("val, EMA", LINES[1]),
    "train/top1": ("train", LINES[2]),
}
_TOTAL: Lines = {"train/loss": ("total", "black")}
_RATE: Lines = {"train/lr": ("lr", LINES[0])}


def plot_curves(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draws accuracy, losses, recall per stage and learning rate over the steps, as far as the rows have them."""
    panels = (
        ("Accuracy", "top-1, %", _ACCURACY),
        ("Loss", "loss", _TOTAL | _stages(rows, "train/loss")),
        ("True class still on the shortlist (val)", "recall, %", _stages(rows, "val/recall")),
        ("Learning rate", "lr", _RATE),
    )
    with figure(path, 2, 2, (5, 3.25), title) as axes:
        for axis, (panel, label, lines) in zip(axes.flat, panels, strict=True):
            axis.set(title=panel, xlabel="step", ylabel=label)
            _plot(axis, rows, lines)


def _stages(rows: Sequence[Mapping[str, float]], measure: str) -> Lines:
    """A line for each stage that the rows have; a stage has one colour in all panels."""
    names = {name: name for row in rows for name in row}
    return {name: (f"after stage {stage}", STAGE_COLORS[stage]) for stage, name in by_stage(names, measure).items()}


def _plot(axis: Axes, rows: Sequence[Mapping[str, float]], lines: Lines) -> None:
    for name, (label, color) in lines.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            marker = "o" if len(points) == 1 else None
            axis.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, linewidth=1.3)
    if axis.lines:
        axis.legend(frameon=False)
    else:
        axis.text(0.5, 0.5, "this model has no stages", ha="center", transform=axis.transAxes, color="grey")

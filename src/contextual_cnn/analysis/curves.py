"""curves.png: a run at a glance, drawn from the rows of its metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from contextual_cnn.analysis.style import figure

_PANELS = (
    # title, axis label, metrics as (name, label)
    (
        "Accuracy",
        "top-1, %",
        (("val/top1", "val"), ("val_ema/top1", "val, EMA"), ("train/top1", "train")),
    ),
    (
        "Loss",
        "loss",
        (("train/loss", "total"), *((f"train/loss_stage{i}", f"stage {i}") for i in range(1, 5))),
    ),
    (
        "True class still on the shortlist (val)",
        "recall, %",
        tuple((f"val/recall_stage{i}", f"after stage {i}") for i in range(1, 4)),
    ),
    ("Learning rate", "lr", (("train/lr", "lr"),)),
)


def plot_curves(rows: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Draws accuracy, losses, recall per stage and learning rate over the steps, as far as the rows have them."""
    with figure(path, 2, 2, (5, 3.25), title) as axes:
        for axis, (panel, label, metrics) in zip(axes.flat, _PANELS, strict=True):
            for name, legend in metrics:
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        label=legend,
                        marker="o" if len(points) == 1 else None,
                        linewidth=1.3,
                    )
            axis.set(title=panel, xlabel="step", ylabel=label)
            if axis.lines:
                axis.legend(frameon=False)
            else:
                axis.text(0.5, 0.5, "this model has no stages", ha="center", transform=axis.transAxes, color="grey")

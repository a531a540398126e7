"""Overlays runs: one curve per run of one metric, from their metrics.jsonl. Needs no network.

python scripts/analysis/plot.py outputs/NAME [outputs/OTHER ...] [--metric val/top1] [--output compare.png]
"""

import argparse
import difflib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a cluster

import matplotlib.pyplot as plt

from contextual_cnn.errors import UserError, run_script
from contextual_cnn.runs.loggers import read_metrics

LOWER_IS_BETTER = ("loss",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, outputs/NAME")
    parser.add_argument("--metric", default="val/top1", help="default: val/top1")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), metavar="FILE")
    arguments = parser.parse_args()
    curves = {run: read_curve(run, arguments.metric) for run in dict.fromkeys(arguments.runs)}
    try:
        draw_curves(curves, arguments.metric, arguments.output)
    except (OSError, ValueError) as error:  # ValueError: not the name of a picture
        raise UserError(f"the picture cannot be written: {error}", "--output FILE.png") from error
    for run, points in curves.items():
        best = best_of(points, arguments.metric)
        print(f"{run}: {len(points)} points, last {points[-1][1]:.4g}, best {best[1]:.4g} at step {best[0]:.0f}")
    print(arguments.output)


def read_curve(run: Path, metric: str) -> list[tuple[float, float]]:
    """(step, value) of one run, by step."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"there is no {file}", "give run folders: outputs/NAME")
    rows = read_metrics(file)
    points = sorted((row["step"], row[metric]) for row in rows if metric in row)
    if not points:
        known = sorted({name for row in rows for name in row} - {"step"})
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean --metric {near[0]}? " if near else ""
        raise UserError(f"{file} has no {metric}", f"{hint}there are {', '.join(known) or 'no metrics yet'}")
    return points


def best_of(points: list[tuple[float, float]], metric: str) -> tuple[float, float]:
    choose = min if any(word in metric for word in LOWER_IS_BETTER) else max
    return choose(points, key=lambda point: point[1])


def draw_curves(curves: dict[Path, list[tuple[float, float]]], metric: str, output: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for run, points in curves.items():
        steps, values = zip(*points, strict=True)
        best = best_of(points, metric)
        marker = "o" if len(points) < 20 else None
        label = f"{run}, best {best[1]:.4g}".replace("$", r"\$")
        axis.plot(steps, values, label=label, marker=marker, markersize=3.5, linewidth=1.3)
    axis.set(xlabel="step", ylabel=metric, title=metric)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)

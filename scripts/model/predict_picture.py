"""The picture of a prediction: what the model saw, its likeliest classes, and its shortlists."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a cluster

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from predict_subjects import Prediction, describe_shortlist

from contextual_cnn.text import printable

GAP = 2  # pixels between frames
FRAMES_PER_SECOND = 4


def draw_prediction(
    prediction: Prediction, pictures: np.ndarray, names: Sequence[str], model: str, output: Path
) -> None:
    """A .gif shows the frames in turns.

    Args:
        pictures: (T, S, S, 3) in [0, 1].
        names: of all classes.
    """
    animated = output.suffix.lower() == ".gif"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(1, 1.2), layout="constrained")
    shown = left.imshow(pictures[0] if animated else side_by_side(pictures))
    left.set_axis_off()
    draw_bars(right, prediction, names)
    lines = [shorten(describe_shortlist(shortlist, names), 130) for shortlist in prediction.shortlists]
    figure.supxlabel("\n".join(lines), fontsize=9, x=0.01, ha="left")
    figure.suptitle(shorten(f"{printable(prediction.path.name)}, by {model}", 100))
    if animated:
        turns = FuncAnimation(figure, lambda t: [shown.set_data(pictures[t])], frames=len(pictures))
        turns.save(output, writer=PillowWriter(fps=FRAMES_PER_SECOND), dpi=90)
    else:
        figure.savefig(output, dpi=120)
    plt.close(figure)


def side_by_side(pictures: np.ndarray) -> np.ndarray:
    """(T, S, S, 3) -> one picture, row by row, as square as it can be."""
    count, height, width = pictures.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.ones((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), np.float32)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def draw_bars(axes: plt.Axes, prediction: Prediction, names: Sequence[str]) -> None:
    classes, probabilities = zip(*reversed(prediction.top), strict=True)
    bars = axes.barh(range(len(classes)), [100 * p for p in probabilities], color="tab:blue", height=0.6)
    axes.bar_label(bars, fmt="%.1f %%", padding=3)
    axes.set(xlim=(0, 115), xticks=range(0, 101, 25), xlabel="probability, %", title="likeliest classes")
    axes.set_yticks(range(len(classes)), [shorten(names[i], 28) for i in classes])
    axes.spines[["top", "right"]].set_visible(False)


def shorten(text: str, length: int) -> str:
    """Plain text for matplotlib, which reads $ as the start of mathematics."""
    text = text if len(text) <= length else f"{text[: length - 3]}..."
    return text.replace("$", r"\$")

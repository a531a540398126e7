"""lr_schedule.png: the learning rate over a run, drawn before it starts."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a cluster

import matplotlib.pyplot as plt
import numpy as np


def plot_schedule(rates: Sequence[tuple[int, float]], steps_per_epoch: int, path: Path, title: str) -> None:
    """Draws (step, learning rate) pairs over the steps, with the epochs on a second axis above."""
    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axis.plot(*zip(*rates, strict=True), linewidth=1.5)
    axis.set(title=title, xlabel="step", ylabel="learning rate", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.spines["right"].set_visible(False)
    epochs = axis.secondary_xaxis(
        "top", (lambda step: np.divide(step, steps_per_epoch), lambda epoch: np.multiply(epoch, steps_per_epoch))
    )
    epochs.set_xlabel("epoch")
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""How the project's figures look: one style, colours that colour-blind readers can tell apart, one way to a file."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

STYLE: dict[Any, Any] = {  # matplotlib lists its keys as literals
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
}
# Okabe and Ito's palette; a true class is orange in every figure
TRUE, KEPT, FADING, DROPPED = "#E69F00", "#0072B2", "#56B4E9", "#BBBBBB"
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
STAGE_COLORS = dict(enumerate(LINES, start=1))  # in every figure that has lines of several stages
DIVERGING = "PuOr_r"
_LETTERS_PER_INCH = 11  # of a title


@contextmanager
def figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], title: str, **options: Any
) -> Iterator[np.ndarray]:
    """Axes of rows x columns panels, (rows, columns) even for one; on leaving, drawn to a PNG file.

    Args:
        size: of a panel, width and height in inches.
        title: broken to the figure's width.
        options: what `plt.subplots` takes.
    """
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(
            rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained", squeeze=False, **options
        )
        width = int(_LETTERS_PER_INCH * size[0] * columns)
        drawn.suptitle("\n".join(textwrap.fill(line, width) for line in title.splitlines()), fontsize=11)
        try:
            yield axes
            drawn.savefig(path, dpi=120)
        finally:
            plt.close(drawn)


def show_image(axis: Axes, pixels: np.ndarray | Tensor, title: str = "", **options: Any) -> None:
    """An image without ticks and frame."""
    axis.imshow(np.asarray(pixels), **options)
    axis.set_title(title, fontsize=9)
    bare(axis)


def bare(axis: Axes) -> None:
    """No ticks, no grid, no frame."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def short(name: str, length: int = 18) -> str:
    """A class name that fits beside a bar."""
    return name if len(name) <= length else name[: length - 1] + "…"

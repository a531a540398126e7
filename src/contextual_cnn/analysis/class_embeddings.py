"""What the models know of the classes: t-SNE of the embeddings (figure 5a), similarity of the classes (5b)."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from contextual_cnn.analysis.images import Images
from contextual_cnn.analysis.style import DIVERGING, DROPPED, KEPT, TRUE, figure, short, show_image
from contextual_cnn.contracts import StagedScores
from contextual_cnn.errors import UserError

_MOST_NAMES = 20  # beside their points, of all the classes that there are; more would cover each other
_MOST_LISTED = 10  # below the panel, of the classes considered


def project(vectors: Tensor, seed: int = 0) -> np.ndarray:
    """(N, E) -> (N, 2) by t-SNE of the cosine distances, which are what scores are made of.

    Raises:
        UserError: scikit-learn is not installed, which nothing else needs.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("embeddings needs scikit-learn for its t-SNE", 'pip install -e ".[analysis]"') from error
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    tsne = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return tsne.fit_transform(vectors.detach().float().cpu().numpy())


def class_similarity(vectors: Tensor) -> Tensor:
    """(N, E) -> (N, N) cosine similarities."""
    unit = F.normalize(vectors.detach().float().cpu(), dim=1)
    return unit @ unit.T


def off_diagonal(similarity: Tensor) -> Tensor:
    """(N, N) -> (N (N - 1),) of the pairs of different classes."""
    return similarity[~torch.eye(len(similarity), dtype=torch.bool)]


def plot_considered_classes(
    points: np.ndarray,
    images: Images,
    scores: StagedScores,
    classes: Sequence[str],
    path: Path,
) -> None:
    """A row for each image, a column for each stage: all classes, and those that the stage considers highlighted.

    Args:
        points: (N, 2), of the classes.
    """
    taking = [stage + 1 for stage in scores.stages[:-1]]  # each takes the shortlist of the stage before as its context
    columns = [("stage 1", None), *((f"stage {stage}", s) for stage, s in zip(taking, scores.shortlists, strict=True))]
    title = "t-SNE of the class embeddings: the classes that each stage considers"
    with figure(path, len(images.names), 1 + len(columns), (2.6, 2.7), title) as axes:
        for b, row in enumerate(axes):
            label, says = images.labels[b], int(scores.logits[-1][b].argmax())
            known = f"true: {short(classes[label])}\n" if label is not None else ""
            show_image(row[0], images.pixels[b], f"{known}predicted: {short(classes[says])}")
            for axis, (name, shortlist) in zip(row[1:], columns, strict=True):
                considered = list(range(len(points))) if shortlist is None else shortlist[b].tolist()
                gone = "" if label is None or label in considered else " (true out)"
                axis.set_title(f"{name}: {len(considered)} of {len(points)}{gone}", fontsize=9)
                _plot_classes(axis, points, considered, label, classes)
        axes[0, 0].figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False)


def plot_similarity(matrices: Mapping[str, Tensor], path: Path) -> None:
    """The matrices side by side under one colour scale, which ends at the most similar pair of different classes."""
    limit = max(off_diagonal(matrix).abs().max().item() for matrix in matrices.values())
    with figure(path, 1, len(matrices), (4.4, 4.5), "Cosine similarity of the classes, in the data's order") as axes:
        for axis, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
            drawn = axis.imshow(matrix.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
            pairs = off_diagonal(matrix)
            sizes = f"different classes: mean {pairs.mean():+.3f}, mean absolute {pairs.abs().mean():.3f}"
            axis.set_title(f"{name}\n{sizes}", fontsize=9)
            axis.set(xlabel="class", ylabel="class")
            axis.grid(False)
        bar = axes[0, 0].figure.colorbar(drawn, ax=axes[0].tolist(), shrink=0.75, extend="max")
        bar.set_label("cosine similarity (1 on the diagonal)")


def _plot_classes(
    axis: Axes, points: np.ndarray, considered: list[int], label: int | None, classes: Sequence[str]
) -> None:
    others = np.setdiff1d(np.arange(len(points)), considered)
    axis.scatter(points[others, 0], points[others, 1], s=10, color=DROPPED, linewidths=0)
    axis.scatter(points[considered, 0], points[considered, 1], s=16, color=KEPT, linewidths=0)
    if label is not None:
        x, y = points[label]
        axis.scatter(x, y, s=110, marker="*", color=TRUE, edgecolors="black", linewidths=0.6, zorder=3)
    if len(points) <= _MOST_NAMES:
        for i in considered:
            axis.annotate(
                short(classes[i], 12), points[i], xytext=(2, 3), textcoords="offset points", fontsize=7, zorder=4
            )
    elif len(considered) <= _MOST_LISTED:
        axis.set_xlabel(textwrap.fill(",  ".join(short(classes[i], 16) for i in considered), 44), fontsize=7.5)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color=DROPPED)
    axis.margins(0.1)


def _legend() -> list[Line2D]:
    marks = (("considered", "o", KEPT, 5), ("not considered", "o", DROPPED, 5), ("true class", "*", TRUE, 10))
    return [
        Line2D([], [], linestyle="", marker=marker, color=color, markersize=size, label=text)
        for text, marker, color, size in marks
    ]

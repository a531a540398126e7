"""How well each class is told from the others: precision, recall, F1, and what it is taken for."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contextual_cnn.errors import UserError
from contextual_cnn.runs.csv_file import write_csv


class ClassReport(NamedTuple):
    """By class, (N,) each. Shares are between 0 and 1; a share of nothing is 0, as scikit-learn has it.

    images: of the class. confused_with: the class that most of its images are taken for, but itself; -1 if none is.
    confused: how many.
    """

    images: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    confused_with: np.ndarray
    confused: np.ndarray


def report_classes(targets: np.ndarray, predicted: np.ndarray, classes: int) -> ClassReport:
    """targets, predicted: (images,) classes; an image that cannot be used is predicted as -1, and counts as wrong."""
    images = np.bincount(targets, minlength=classes)
    hits = np.bincount(targets[predicted == targets], minlength=classes)
    taken_for = np.bincount(predicted[predicted >= 0], minlength=classes)
    confused_with, confused = _most_confused(targets, predicted, classes)
    return ClassReport(
        images,
        precision=hits / np.maximum(taken_for, 1),
        recall=hits / np.maximum(images, 1),
        f1=2 * hits / np.maximum(images + taken_for, 1),
        confused_with=confused_with,
        confused=confused,
    )


def _most_confused(targets: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """By class: the other class that most of its images are taken for, or -1, and how many; of equals the first.

    From the pairs that occur, as a table of 21,841 classes by as many takes 3.6 GB.
    """
    wrong = (predicted >= 0) & (predicted != targets)
    pairs, counts = np.unique(targets[wrong].astype(np.int64) * classes + predicted[wrong], return_counts=True)
    target, other = np.divmod(pairs, classes)
    order = np.lexsort((other, -counts, target))
    with_some, first = np.unique(target[order], return_index=True)
    confused_with, confused = np.full(classes, -1, dtype=np.int64), np.zeros(classes, dtype=np.int64)
    confused_with[with_some], confused[with_some] = other[order][first], counts[order][first]
    return confused_with, confused


def write_class_report(
    path: Path, report: ClassReport, classes: Sequence[str], descriptions: Mapping[str, str]
) -> None:
    """A CSV line for each class that has images, the worst F1 first.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_csv(path, _rows(report, classes, descriptions))
    except OSError as error:
        raise UserError(f"per_class: {path} cannot be written: {error}", "per_class=FILE") from error


def _rows(report: ClassReport, classes: Sequence[str], descriptions: Mapping[str, str]) -> Iterator[Sequence[object]]:
    yield ["class", "description", "images", "precision", "recall", "f1", "confused_with", "confused"]
    for i in sorted(np.flatnonzero(report.images).tolist(), key=lambda i: report.f1[i]):
        other, name = report.confused_with[i], classes[i]
        shares = (f"{share[i]:.6f}" for share in (report.precision, report.recall, report.f1))
        confused_with = classes[other] if other >= 0 else ""
        yield [name, descriptions.get(name, ""), report.images[i], *shares, confused_with, report.confused[i]]

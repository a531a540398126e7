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
    confusion = np.zeros((classes, classes), dtype=np.int64)
    usable = predicted >= 0
    np.add.at(confusion, (targets[usable], predicted[usable]), 1)
    images = np.bincount(targets, minlength=classes)
    hits, taken_for = confusion.diagonal().copy(), confusion.sum(axis=0)
    np.fill_diagonal(confusion, 0)
    confused = confusion.max(axis=1)
    return ClassReport(
        images,
        precision=hits / np.maximum(taken_for, 1),
        recall=hits / np.maximum(images, 1),
        f1=2 * hits / np.maximum(images + taken_for, 1),
        confused_with=np.where(confused > 0, confusion.argmax(axis=1), -1),
        confused=confused,
    )


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

"""Figures by class, against scikit-learn's."""

import csv
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from contextual_cnn.errors import UserError
from contextual_cnn.tasks.image_classification.class_report import report_classes, write_class_report


def test_the_figures_are_scikit_learns():
    rng = np.random.default_rng(0)
    targets, predicted = rng.integers(0, 6, 200), rng.integers(0, 5, 200)  # class 5 is never predicted
    report = report_classes(targets, predicted, 7)  # class 6 has no image
    expected = precision_recall_fscore_support(targets, predicted, labels=range(7), zero_division=0)
    np.testing.assert_allclose((report.precision, report.recall, report.f1, report.images), expected)
    matrix = confusion_matrix(targets, predicted, labels=range(7))
    np.fill_diagonal(matrix, 0)
    np.testing.assert_array_equal(report.confused, matrix.max(axis=1))
    np.testing.assert_array_equal(report.confused_with[:6], matrix.argmax(axis=1)[:6])
    assert report.confused_with[6] == -1


def test_an_image_that_cannot_be_used_is_a_miss():
    report = report_classes(np.array([0, 0, 1]), np.array([0, -1, 1]), 2)
    assert report.recall.tolist() == [0.5, 1.0]
    assert report.precision.tolist() == [1.0, 1.0]
    assert report.confused_with.tolist() == [-1, -1]


def test_the_file_has_the_worst_class_first(tmp_path):
    report = report_classes(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), 3)
    write_class_report(tmp_path / "a.csv", report, ("cat", "=dog, tame", "none"), {"cat": "felis"})
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["'=dog, tame", "cat"]
    assert (rows[0]["confused_with"], rows[0]["confused"], rows[1]["description"]) == ("cat", "1", "felis")
    with pytest.raises(UserError, match="cannot be written"):
        write_class_report(tmp_path, report, ("cat", "dog", "none"), {})


def test_it_is_the_whole_table_without_the_table():
    draw = np.random.default_rng(0)
    for classes in (2, 5, 50):
        for _ in range(50):
            targets, predicted = draw.integers(0, classes, 60), draw.integers(-1, classes, 60)
            table = np.zeros((classes, classes), dtype=np.int64)
            np.add.at(table, (targets[predicted >= 0], predicted[predicted >= 0]), 1)
            report = report_classes(targets, predicted, classes)
            assert np.array_equal(report.recall, table.diagonal() / np.maximum(report.images, 1))
            np.fill_diagonal(table, 0)
            assert np.array_equal(report.confused, table.max(axis=1))
            assert np.array_equal(report.confused_with, np.where(table.any(axis=1), table.argmax(axis=1), -1))


def test_many_classes_take_little_memory():
    """ImageNet-21K's: the table would be 3.6 GiB."""
    draw = np.random.default_rng(0)
    targets, predicted = draw.integers(0, 21_841, (2, 50_000))
    tracemalloc.start()
    try:
        report_classes(targets, predicted, 21_841)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()

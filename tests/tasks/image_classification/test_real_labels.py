"""ReaL's labels belong to images by their number, and images without any do not count."""

import json

import numpy as np
import pytest
import torch

from contextual_cnn.data.sources.source import ImageFiles
from contextual_cnn.errors import UserError
from contextual_cnn.tasks.image_classification.predictions import Predictions
from contextual_cnn.tasks.image_classification.real_labels import RealAccuracy, read_real_labels, real_accuracy


def images(root, *numbers):
    paths = tuple(f"val/n01440764/ILSVRC2012_val_{number:08d}.JPEG" for number in numbers)
    return ImageFiles(root, ("a", "b", "c"), paths, np.zeros(len(numbers), dtype=np.int64))


def write(tmp_path, content):
    file = tmp_path / "real.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_labels_follow_the_number_in_the_name_not_the_place_in_the_listing(tmp_path):
    source = images(tmp_path, 4, 1, 3)
    labels = read_real_labels(write(tmp_path, [[2], [0], [], [0, 1]]), source)
    assert labels == [{0, 1}, {2}, set()]
    predictions = Predictions(torch.tensor([[1, 0], [0, 2], [0, 1]]), torch.zeros(3, 2))
    assert real_accuracy(labels, predictions) == RealAccuracy(images=2, hits=1)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("[[0], [1]", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ({"a": [1]}, "no list of lists of class numbers from 0 to 2"),
        ([[0], [3], [0]], "no list of lists of class numbers"),
        ([[0], [True], [0]], "no list of lists of class numbers"),
        ([[0], 1, [2]], "no list of lists of class numbers"),
        ([[], [0], []], "no label for any of these images"),
        ([[0]], "ILSVRC2012_val_00000003.JPEG is none of them"),
    ],
)
def test_what_is_not_reals_file_is_refused(tmp_path, content, cause):
    with pytest.raises(UserError, match=cause):
        read_real_labels(write(tmp_path, content), images(tmp_path, 1, 3))


def test_images_that_are_not_imagenets_are_refused(tmp_path):
    source = ImageFiles(tmp_path, ("a",), ("val/a/1.JPEG",), np.zeros(1, dtype=np.int64))
    with pytest.raises(UserError, match=r"val/a/1\.JPEG"):
        read_real_labels(write(tmp_path, [[0]]), source)

"""ReaL: ImageNet's val images with all the labels that fit (Beyer et al., Are we done with ImageNet?, 2020).

Their real.json is a list of 50,000 lists of class numbers: that of ILSVRC2012_val_00000001.JPEG is the first. Class
numbers are those of the sorted WordNet ids, the order of the training's class folders. About 3,000 images have no
label; they are left out, as the authors do.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from contextual_cnn.data.sources import ImageSource
from contextual_cnn.errors import UserError
from contextual_cnn.tasks.image_classification.predictions import Predictions

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class RealAccuracy(NamedTuple):
    """Images with a label, and those of them whose first class is one of their labels."""

    images: int
    hits: int


def read_real_labels(path: Path, source: ImageSource) -> list[frozenset[int]]:
    """The labels of each image of a split, in its order.

    Raises:
        UserError: no such file, not ReaL's format, or images whose names do not say which they are.
    """
    labels = _read(path, len(source.classes))
    matches = [_NUMBER.search(source.name(index)) for index in range(len(source))]
    numbers = [int(match[1]) if match else 0 for match in matches]
    for index, number in enumerate(numbers):
        if not 1 <= number <= len(labels):
            raise UserError(
                f"real_labels: {path} has the labels of {len(labels)} val images by number, and "
                f"{source.name(index)} is none of them",
                "data.root=ROOT of ImageNet's own val split, with files named ILSVRC2012_val_00000001.JPEG",
            )
    chosen = [labels[number - 1] for number in numbers]
    if not any(chosen):
        raise UserError(f"real_labels: {path} has no label for any of these images", "real_labels=null")
    return chosen


def real_accuracy(labels: list[frozenset[int]], predictions: Predictions) -> RealAccuracy:
    first = predictions.classes[:, 0].tolist()
    hits = [prediction in fitting for prediction, fitting in zip(first, labels, strict=True) if fitting]
    return RealAccuracy(len(hits), sum(hits))


def _read(path: Path, classes: int) -> list[frozenset[int]]:
    fix = "real_labels=real.json of github.com/google-research/reassessed-imagenet"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"real_labels: {path} cannot be read as JSON: {error}", fix) from error
    if not isinstance(found, list) or not all(_are_labels(labels, classes) for labels in found):
        raise UserError(f"real_labels: {path} is no list of lists of class numbers from 0 to {classes - 1}", fix)
    return [frozenset(labels) for labels in found]


def _are_labels(labels: object, classes: int) -> bool:
    return isinstance(labels, list) and all(type(label) is int and 0 <= label < classes for label in labels)

"""The report of an evaluation: its figures, and the file beside the checkpoint.

evaluation.json is of the run's own whole val split. An evaluation of other data, or of a part, has a file of its own,
named by what differs: evaluation_limit-200_1f0c55d2.json.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from contextual_cnn.data.sources import ImageSource
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.tasks.image_classification.class_report import ClassReport
from contextual_cnn.tasks.image_classification.predictions import Predictions
from contextual_cnn.tasks.image_classification.real_labels import RealAccuracy
from contextual_cnn.tasks.image_classification.reliability import expected_calibration_error, wilson_interval

# What makes other images, or fewer. All else makes the same images in another way
_PATHS = ("root", "exclude")
_VALUES = ("layout", "limit", "image_size", "crop_pct", "interpolation", "mean", "std")
_LONGEST_NAME = 100


def figures(
    predictions: Predictions, source: ImageSource, by_class: ClassReport, real: RealAccuracy | None
) -> dict[str, Any]:
    """What the predictions tell beyond the counts, in percent."""
    hits = predictions.classes[:, 0] == torch.tensor(source.targets)
    error = expected_calibration_error(predictions.probabilities[:, 0], hits)
    report = {
        "top1_interval": _interval(int(hits.sum()), len(hits)),
        "calibration_error": 100 * error,
        "mean_f1": 100 * float(by_class.f1[by_class.images > 0].mean()),
    }
    if real is not None:
        report |= {
            "real_top1": 100 * real.hits / real.images,
            "real_top1_interval": _interval(real.hits, real.images),
            "real_images": real.images,
        }
    return report


def differing_data(own: DataSettings, evaluated: DataSettings) -> dict[str, Any]:
    """The keys that make other images of `evaluated` than of the run's own data, with their values."""
    before, now = (
        {key: _absolute(getattr(data, key)) for key in _PATHS} | {key: getattr(data, key) for key in _VALUES}
        for data in (own, evaluated)
    )
    noise = {"loader": "synthetic"} if evaluated.loader == "synthetic" else {}
    return {key: value for key, value in now.items() if value != before[key]} | noise


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes the report, whose "differences", "control" and "views" choose the file, and prints where it is.

    A folder that cannot be written costs the file alone.
    """
    path = folder / _file_name(report["differences"] | report.get("control", {}) | report.get("views", {}))
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"report: {path}")
    except OSError as error:
        print(f"{path.name} was not written: {error}")


def _file_name(differences: Mapping[str, Any]) -> str:
    if not differences:
        return "evaluation.json"
    words = "_".join(f"{key}-{Path(str(value)).name if key in _PATHS else value}" for key, value in differences.items())
    words = re.sub(r"[^\w.-]+", "-", words, flags=re.ASCII)[:_LONGEST_NAME]
    digest = hashlib.sha256(json.dumps(differences, sort_keys=True).encode()).hexdigest()
    return f"evaluation_{words}_{digest[:8]}.json"


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def _interval(hits: int, images: int) -> list[float]:
    return [100 * end for end in wilson_interval(hits, images)]

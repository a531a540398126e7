"""The evaluation of a checkpoint: its detector is shown every image of a val split once, and judged as COCO does."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contextual_cnn.data.detection.coco_data import CocoData
from contextual_cnn.distributed import World
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.engine.precision import autocast, under
from contextual_cnn.errors import UserError
from contextual_cnn.runs.own_files import replaced
from contextual_cnn.settings.evaluation import EvaluationSettings
from contextual_cnn.tasks.image_classification.report import write_report
from contextual_cnn.tasks.instance_segmentation.measure import Answer, CocoEvaluation, Found
from contextual_cnn.tasks.instance_segmentation.restore import TrainedDetector, restore_detector

__all__ = ["evaluate_checkpoint", "ranking"]

_NAMES = {
    "ap": "AP",
    "ap50": "AP at IoU 0.50",
    "ap75": "AP at IoU 0.75",
    "ap_small": "AP of small objects",
    "ap_medium": "AP of medium ones",
    "ap_large": "AP of large ones",
    "ar": "AR, 100 detections",
}


def evaluate_checkpoint(
    path: Path, state: Mapping[str, Any], settings: EvaluationSettings, world: World, console: Console
) -> dict[str, Any]:
    """The report of one checkpoint, complete on rank 0, where it is printed and written too.

    Args:
        state: what the file holds.

    Raises:
        UserError: keys that mean nothing for a detector.
    """
    _check(settings, path)
    trained = restore_detector(path, state, settings.weights, settings.data)
    data = CocoData(trained.data, ("val",), trained.classes)
    data.log_summary()
    torch.backends.cudnn.benchmark = False  # as in training
    answers: list[Answer] = []
    model = trained.model.to(world.device)
    calls = {"model": under(autocast(settings.precision, world.device), model)}
    report: dict[str, Any] = evaluate({"model": model}, calls, CocoEvaluation(data, world, answers.append), world)[
        "model"
    ]
    if not world.is_main:
        return report
    (answer,) = answers
    report |= {
        "weights": trained.weights,
        "checkpoint": str(trained.path),
        "step": trained.step,
        "data": str(data.root),
        "differences": trained.differences,
        "by_class": _by_class(answer, data.classes),
    }
    console.print(_table(trained, report))
    write_report(trained.path.parent, report)
    print(f"mask AP {report['mask_ap']:.2f}")
    if (file := settings.file("predictions")) is not None:
        _write_predictions(file, answer.found)
    if (file := settings.file("per_class")) is not None:
        _write_classes(file, report["by_class"])
    return report


def ranking(reports: Sequence[Mapping[str, Any]]) -> Table:
    """Several checkpoints, the best first."""
    table = Table(title=f"{len(reports)} checkpoints")
    table.add_column("checkpoint", overflow="fold")
    for name in ("weights", "box AP", "mask AP", "step"):
        table.add_column(name, justify="right")
    for report in sorted(reports, key=lambda report: report["mask_ap"], reverse=True):
        scores = (f"{report['box_ap']:.2f}", f"{report['mask_ap']:.2f}")
        table.add_row(escape(report["checkpoint"]), report["weights"], *scores, f"{report['step']}")
    return table


def _check(settings: EvaluationSettings, path: Path) -> None:
    given = {
        "real_labels": settings.real_labels is not None,
        "context": settings.context != "own",
        "context_stages": settings.context_stages is not None,
    }
    given |= {f"clip.{key}": True for key in settings.clip}
    keys = [key for key, is_given in given.items() if is_given]
    if keys:
        fixes = [f"{key}={'own' if key == 'context' else 'null'}" for key in keys]
        raise UserError(f"{', '.join(keys)}: {path} is of a detector", " ".join(fixes))


def _by_class(answer: Answer, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """By class: box and mask AP in percent; a class without objects is left out."""
    return {
        name: {f"{kind}_ap": float(values[label]) for kind, values in answer.by_class.items()}
        for label, name in enumerate(classes)
        if not any(math.isnan(values[label]) for values in answer.by_class.values())
    }


def _table(trained: TrainedDetector, report: Mapping[str, Any]) -> Table:
    lines = [f"Mask R-CNN on {trained.settings.name}, {report['weights']} weights of {report['checkpoint']}"]
    if report["differences"]:
        keys = ", ".join(f"data.{key}={value}" for key, value in report["differences"].items())
        lines.append(f"not the run's own val split: {keys}")
    table = Table(title=escape("\n".join(lines)))
    table.add_column("measure")
    for name in ("boxes", "masks"):
        table.add_column(name, justify="right")
    for figure, name in _NAMES.items():
        values = [report.get(f"{kind}_{figure}") for kind in ("box", "mask")]
        table.add_row(name, *("-" if value is None else f"{value:.2f}" for value in values))
    table.add_row("images, each counted once", "", f"{report['images']}")
    if report["bad_images"]:
        table.add_row("of them bad, nothing found in them", "", f"{report['bad_images']}")
    table.add_row("images/s", "", f"{report['images_per_second']:.3g}")
    return table


def _write_predictions(path: Path, found: Found) -> None:
    """COCO's results format, as its server takes it."""
    with replaced(path) as new:
        new.write_text(json.dumps(found) + "\n")
    print(f"detections: {path}")


def _write_classes(path: Path, by_class: Mapping[str, Mapping[str, float]]) -> None:
    """The worst first."""
    with replaced(path) as new, new.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "box_ap", "mask_ap"])
        for name, values in sorted(by_class.items(), key=lambda item: item[1]["mask_ap"]):
            writer.writerow([name, f"{values['box_ap']:.2f}", f"{values['mask_ap']:.2f}"])
    print(f"classes: {path}")

"""The evaluation of a checkpoint: its model is shown every image of a val split once, and reported on."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from contextual_cnn.data.image_data import ImageData
from contextual_cnn.distributed import World
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.engine.precision import autocast, under
from contextual_cnn.errors import UserError
from contextual_cnn.randomness import Purpose, generator
from contextual_cnn.settings.evaluation import EvaluationSettings
from contextual_cnn.task import Evaluation
from contextual_cnn.tasks.image_classification.class_report import report_classes, write_class_report
from contextual_cnn.tasks.image_classification.context_control import ControlledEvaluation
from contextual_cnn.tasks.image_classification.measure import ClassificationEvaluation
from contextual_cnn.tasks.image_classification.predictions import Predictions, PredictionTable, write_predictions
from contextual_cnn.tasks.image_classification.real_labels import read_real_labels, real_accuracy
from contextual_cnn.tasks.image_classification.report import differing_data, figures, write_report
from contextual_cnn.tasks.image_classification.tables import ranking, report_table
from contextual_cnn.trained import Trained, describe_classes, restore

log = logging.getLogger(__name__)

__all__ = ["evaluate_checkpoint", "ranking"]


def evaluate_checkpoint(
    path: Path, state: Mapping[str, Any], settings: EvaluationSettings, world: World, console: Console
) -> dict[str, Any]:
    """The report of one checkpoint, complete on rank 0, where it is printed and written too.

    Args:
        state: what the file holds.

    Raises:
        UserError: keys of clips, which images do not have.
    """
    if settings.clip:
        keys = [f"clip.{key}" for key in settings.clip]
        raise UserError(
            f"{', '.join(keys)}: {path} is of images, not of videos", " ".join(f"{key}=null" for key in keys)
        )
    trained = restore(path, state, settings.weights, settings.data)
    data = ImageData(trained.data, ("val",), trained.classes)
    return evaluate_trained(trained, data, settings, world, console)


def evaluate_trained(
    trained: Trained,
    data: ImageData,
    settings: EvaluationSettings,
    world: World,
    console: Console,
    *,
    of: Callable[[ClassificationEvaluation], Evaluation] = lambda evaluation: evaluation,
    views: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report of a model, complete on rank 0, where it is printed and written too.

    Args:
        of: what is done with the evaluation of images to make one of what the model is shown.
        views: of videos, what differs from the run's own, by key; it is part of the report.
    """
    source = data.sources["val"]
    if settings.context != "own":  # neighbours in a batch must not be of one class
        source = source.take(generator(Purpose.CONTROL).permutation(len(source)))
        data.sources["val"] = source
    labels_file = settings.file("real_labels")
    labels = read_real_labels(labels_file, source) if labels_file is not None else None
    data.log_summary()
    precision = autocast(settings.precision, world.device)
    report, predictions = _evaluate(trained.model.to(world.device), data, world, precision, settings, of)
    if not world.is_main:
        return report
    by_class = report_classes(source.targets, predictions.classes[:, 0].numpy(), data.num_classes)
    real = real_accuracy(labels, predictions) if labels is not None else None
    report |= figures(predictions, source, by_class, real) | _subject(trained, data) | _control(settings)
    report |= {"views": dict(views)} if views else {}
    console.print(report_table(trained.settings.name, report))
    write_report(trained.path.parent, report)
    print(f"top-1 {report['top1']:.2f}")
    if (predictions_file := settings.file("predictions")) is not None:
        write_predictions(predictions_file, predictions, source)
    if (class_file := settings.file("per_class")) is not None:
        write_class_report(class_file, by_class, data.classes, describe_classes(data.classes))
    return report


def _subject(trained: Trained, data: ImageData) -> dict[str, Any]:
    """What was evaluated."""
    return {
        "weights": trained.weights,
        "checkpoint": str(trained.path),
        "step": trained.step,
        "data": str(data.root),
        "differences": differing_data(trained.own_data, trained.data),
        "loader": data.settings.loader,
        "noise": data.settings.is_noise,
    }


def _control(settings: EvaluationSettings) -> dict[str, Any]:
    if settings.context == "own":
        return {}
    return {"control": {"context": settings.context, "stages": settings.context_stages and [*settings.context_stages]}}


def _evaluate(
    model: nn.Module,
    data: ImageData,
    world: World,
    autocast: AbstractContextManager,
    settings: EvaluationSettings,
    of: Callable[[ClassificationEvaluation], Evaluation],
) -> tuple[dict[str, Any], Predictions]:
    """One pass over all ranks: its counts, and the predictions for each image."""
    present = _classes_to_choose_from(data)
    table = PredictionTable(len(data.sources["val"]), int(present.sum()), world)
    among = None if present.all() else present.to(world.device)
    evaluation = ClassificationEvaluation(data, world, among, table.add)
    if settings.context != "own":
        options: Any = {"control": settings.context, "stages": settings.context_stages}
        evaluation = ControlledEvaluation(data, world, among, table.add, **options)
    report = evaluate({"model": model}, {"model": under(autocast, model)}, of(evaluation), world)["model"]
    return report | {"classes": int(present.sum())}, table.gather()


def _classes_to_choose_from(data: ImageData) -> torch.Tensor:
    """(N,) bool: all classes; of a benchmark those that it has. Says what is unusual about it."""
    source = data.sources["val"]
    if data.layout != "benchmark":
        return torch.ones(data.num_classes, dtype=torch.bool)
    present = torch.zeros(data.num_classes, dtype=torch.bool)
    present[torch.tensor(source.targets)] = True
    if not present.all():
        log.info("%d of the %d classes are there: predictions are made among these", present.sum(), len(present))
    folder, name = Path(source.name(0)).parts[0], data.classes[source.targets[0]]
    if folder != name:
        log.info("the class folders are numbers: %s is %s, and so on in the training's order", folder, name)
    return present

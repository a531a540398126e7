"""Evaluates a checkpoint: python evaluate.py checkpoint=outputs/NAME [data.root=/path/to/imagenet]

Model and data are those of the checkpoint's own config. Every image is counted once, at any number of processes.
A folder of runs, or a pattern, is evaluated run by run, with a table of them at the end.
data.root may also be the folder of ImageNet-A, -R, -V2 or -Sketch (class folders without train/ and val/): a model's
prediction is then made among the classes that are there, as those benchmarks do.
"""

from contextual_cnn.engine.stopping import end_when_asked

if __name__ == "__main__":  # before the imports, which take seconds
    end_when_asked()

import glob
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from contextual_cnn import cli
from contextual_cnn.checkpoint import find_checkpoint, has_checkpoint
from contextual_cnn.cli import Group
from contextual_cnn.data import ImageData
from contextual_cnn.data.resize import Interpolation
from contextual_cnn.distributed import World, process_group
from contextual_cnn.engine.class_report import report_classes, write_class_report
from contextual_cnn.engine.evaluation_report import differing_data, figures, write_report
from contextual_cnn.engine.evaluation_tables import ranking, report_table
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.engine.predictions import Predictions, PredictionTable, check_writable, write_predictions
from contextual_cnn.engine.real_labels import read_real_labels, real_accuracy
from contextual_cnn.engine.run_folder import start_logging
from contextual_cnn.engine.trainer_settings import TrainerSettings
from contextual_cnn.errors import UserError
from contextual_cnn.trained import Trained, describe_classes, load_model

log = logging.getLogger("contextual_cnn.evaluate")


def data_overrides(
    *,
    root: str | None = None,
    layout: Literal["auto", "folders", "list", "shards", "benchmark", "synthetic"] | None = None,
    exclude: str | None = None,
    limit: int | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: Interpolation | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    threads: int | None = None,
    eval_batch_size: int | None = None,
    loader: Literal["dali", "torch", "synthetic"] | None = None,
    on_bad_image: Literal["skip", "stop"] | None = None,
) -> dict[str, Any]:
    """What may differ from the training's data; null keeps its value."""
    return {key: value for key, value in locals().items() if value is not None}


SCHEMA = {
    "checkpoint": str,
    "weights": Literal["auto", "raw", "ema"],
    "device": Literal["auto", "cuda", "cpu"],
    "precision": Literal["auto", "bf16", "fp32"],
    "real_labels": str | None,
    "predictions": str | None,
    "per_class": str | None,
    "data": Group(data_overrides),
}


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf" / "evaluate"), config_name="evaluate"
)
@record
@cli.job
def main(hydra_config: DictConfig) -> None:
    config = cli.read_config(hydra_config, SCHEMA)
    checkpoints = _checkpoints(config["checkpoint"])
    for key in ("predictions", "per_class"):
        if config[key] is not None:
            _check_file(key, Path(config[key]).expanduser(), checkpoints)
    with process_group(config["device"]) as world:
        console = start_logging(world.is_main)
        reports = [_evaluate_checkpoint(path, config, world, console) for path in checkpoints]
        if world.is_main and len(reports) > 1:
            console.print(ranking(reports))


def _evaluate_checkpoint(path: Path, config: dict[str, Any], world: World, console: Console) -> dict[str, Any]:
    """The report of one checkpoint, complete on rank 0, where it is printed and written too."""
    trained = load_model(str(path), config["weights"], data_overrides(**config["data"]))
    data = ImageData(("val",), trained.classes, **trained.config["data"])
    source = data.sources["val"]
    labels = read_real_labels(_file(config["real_labels"]), source) if config["real_labels"] is not None else None
    data.log_summary()
    autocast = TrainerSettings(precision=config["precision"]).autocast(world.device)
    report, predictions = _evaluate(trained.model.to(world.device), data, world, autocast)
    if not world.is_main:
        return report
    by_class = report_classes(source.targets, predictions.classes[:, 0].numpy(), data.num_classes)
    real = real_accuracy(labels, predictions) if labels is not None else None
    report |= figures(predictions, source, by_class, real) | _subject(trained, data)
    console.print(report_table(trained.config["model"]["name"], report))
    write_report(trained.path.parent, report)
    print(f"top-1 {report['top1']:.2f}")
    if config["predictions"] is not None:
        write_predictions(_file(config["predictions"]), predictions, source)
    if config["per_class"] is not None:
        write_class_report(_file(config["per_class"]), by_class, data.classes, describe_classes(data.classes))
    return report


def _subject(trained: Trained, data: ImageData) -> dict[str, Any]:
    """What was evaluated."""
    return {
        "weights": trained.weights,
        "checkpoint": str(trained.path),
        "step": trained.step,
        "data": str(data.root),
        "differences": differing_data(trained.own_data, trained.config["data"]),
        "loader": data.loader,
        "noise": data.is_noise,
    }


def _checkpoints(given: str) -> list[Path]:
    """The checkpoint; those of all runs where a folder of runs or a pattern is given."""
    path = Path(given).expanduser()
    several: list[str] = []
    if path.is_dir() and not has_checkpoint(path):
        several = [str(run) for run in path.iterdir() if run.is_dir()]
    elif not path.exists() and glob.has_magic(given):
        several = glob.glob(str(path))
    found = [find_checkpoint(run) for run in sorted(several) if run.endswith(".pt") or has_checkpoint(Path(run))]
    return found or [find_checkpoint(given)]


def _check_file(key: str, path: Path, checkpoints: list[Path]) -> None:
    if len(checkpoints) > 1:
        raise UserError(f"{key}={path} is of one checkpoint, these are {len(checkpoints)}", f"{key}=null")
    check_writable(path, key)


def _evaluate(
    model: nn.Module, data: ImageData, world: World, autocast: AbstractContextManager
) -> tuple[dict[str, Any], Predictions]:
    """One pass over all ranks: its counts, and the predictions for each image."""
    present = _classes_to_choose_from(data)
    batches = data.evaluation_batches(world)
    table = PredictionTable(batches.images, int(present.sum()), world)
    report = evaluate(
        {"model": model},
        batches,
        batches.images,
        world,
        autocast,
        among=None if present.all() else present.to(world.device),
        observe=lambda _, targets, logits: table.add(targets, logits),
    )["model"]
    return report | {"classes": int(present.sum())}, table.gather()


def _classes_to_choose_from(data: ImageData) -> torch.Tensor:
    """(N,) bool: all classes; of a benchmark those that it has. Says what is unusual about it."""
    source = data.sources["val"]
    if data.layout != "benchmark":
        return torch.ones(data.num_classes, dtype=torch.bool)
    present = torch.zeros(data.num_classes, dtype=torch.bool)
    present[torch.from_numpy(source.targets)] = True
    if not present.all():
        log.info("%d of the %d classes are there: predictions are made among these", present.sum(), len(present))
    folder, name = Path(source.name(0)).parts[0], data.classes[source.targets[0]]
    if folder != name:
        log.info("the class folders are numbers: %s is %s, and so on in the training's order", folder, name)
    return present


def _file(given: str) -> Path:
    return Path(given).expanduser()


if __name__ == "__main__":
    cli.run(main)

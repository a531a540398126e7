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
import json
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from contextual_cnn import cli
from contextual_cnn.checkpoint import find_checkpoint, has_checkpoint
from contextual_cnn.cli import Group
from contextual_cnn.data import ImageData
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.distributed import World, process_group
from contextual_cnn.engine.class_report import report_classes, write_class_report
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.engine.predictions import Predictions, PredictionTable, check_writable, write_predictions
from contextual_cnn.engine.real_labels import RealAccuracy, read_real_labels, real_accuracy
from contextual_cnn.engine.reliability import expected_calibration_error, wilson_interval
from contextual_cnn.engine.run_folder import start_logging
from contextual_cnn.engine.trainer_settings import TrainerSettings
from contextual_cnn.errors import UserError
from contextual_cnn.trained import describe_classes, load_model

log = logging.getLogger("contextual_cnn.evaluate")


def data_overrides(
    *,
    root: str | None = None,
    layout: Literal["auto", "folders", "list", "shards", "benchmark", "synthetic"] | None = None,
    exclude: str | None = None,
    limit: int | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
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
            console.print(_ranking(reports))


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
    report |= _reliability(predictions, source)
    report |= {"mean_f1": 100 * float(by_class.f1[by_class.images > 0].mean())}
    if labels is not None:
        report |= _real_report(real_accuracy(labels, predictions))
    report |= {
        "weights": trained.weights,
        "checkpoint": str(trained.path),
        "data": str(data.root),
        "loader": data.loader,
        "step": trained.step,
    }
    _write_json(trained.path.parent, report)
    console.print(_table(trained.config["model"]["name"], report))
    print(f"top-1 {report['top1']:.2f}")
    if config["predictions"] is not None:
        write_predictions(_file(config["predictions"]), predictions, source)
    if config["per_class"] is not None:
        write_class_report(_file(config["per_class"]), by_class, data.classes, describe_classes(data.classes))
    return report


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
    recalls = [report.pop(name) for name in sorted(report) if name.startswith("recall_stage")]
    return report | {"stage_recall": recalls, "classes": int(present.sum())}, table.gather()


def _classes_to_choose_from(data: ImageData) -> torch.Tensor:
    """(N,) bool: all classes; of a benchmark those that it has. Says what is unusual about it."""
    source = data.sources["val"]
    if data.layout != "benchmark":
        return torch.ones(data.num_classes, dtype=torch.bool)
    present = torch.zeros(data.num_classes, dtype=torch.bool)
    present[torch.from_numpy(source.targets)] = True
    if not present.all():
        log.info("%d of the %d classes are there: predictions are made among these", present.sum(), len(present))
    folder, name = Path(source.name(0)).parent.name, data.classes[source.targets[0]]
    if folder != name:
        log.info("the class folders are numbers: %s is %s, and so on in the training's order", folder, name)
    return present


def _file(given: str) -> Path:
    return Path(given).expanduser()


def _reliability(predictions: Predictions, source: ImageSource) -> dict[str, Any]:
    """All in percent."""
    hits = predictions.classes[:, 0] == torch.from_numpy(source.targets)
    interval = wilson_interval(int(hits.sum()), len(hits))
    error = expected_calibration_error(predictions.probabilities[:, 0], hits)
    return {"top1_interval": [100 * end for end in interval], "calibration_error": 100 * error}


def _real_report(real: RealAccuracy) -> dict[str, Any]:
    return {
        "real_top1": 100 * real.hits / real.images,
        "real_top1_interval": [100 * end for end in wilson_interval(real.hits, real.images)],
        "real_images": real.images,
    }


def _write_json(folder: Path, report: dict[str, Any]) -> None:
    try:
        (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        print(f"evaluation.json was not written: {error}")


def _table(name: str, report: dict[str, Any]) -> Table:
    table = Table(title=f"{name}, {report['weights']} weights of {report['checkpoint']}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("top-1", f"{report['top1']:.2f} %")
    table.add_row("its 95 % confidence interval", _spell(report["top1_interval"]))
    table.add_row("top-5", f"{report['top5']:.2f} %")
    for i, recall in enumerate(report["stage_recall"], start=1):
        table.add_row(f"true class on the shortlist after stage {i}", f"{recall:.2f} %")
    if "real_top1" in report:
        table.add_row(f"top-1 by ReaL, {report['real_images']} images with a label", f"{report['real_top1']:.2f} %")
        table.add_row("its 95 % confidence interval", _spell(report["real_top1_interval"]))
    table.add_row("mean F1 of the classes", f"{report['mean_f1']:.2f} %")
    table.add_row("cross-entropy", f"{report['loss']:.4f}")
    table.add_row("calibration error (ECE, 15 bins)", f"{report['calibration_error']:.2f} %")
    table.add_row("classes to choose from", f"{report['classes']}")
    table.add_row("images, each counted once", f"{report['images']}")
    if report["bad_images"]:
        table.add_row("of them bad, counted as wrong", f"{report['bad_images']}")
    table.add_row("images/s", f"{report['images_per_second']:.0f}")
    table.add_row("loader", report["loader"])
    return table


def _ranking(reports: list[dict[str, Any]]) -> Table:
    """The best first."""
    table = Table(title=f"{len(reports)} checkpoints")
    table.add_column("checkpoint", overflow="fold")
    for name in ("weights", "top-1", "95 % interval", "top-5", "step"):
        table.add_column(name, justify="right")
    for report in sorted(reports, key=lambda report: report["top1"], reverse=True):
        scores = (f"{report['top1']:.2f}", _spell(report["top1_interval"]), f"{report['top5']:.2f}")
        table.add_row(report["checkpoint"], report["weights"], *scores, f"{report['step']}")
    return table


def _spell(interval: list[float]) -> str:
    return f"{interval[0]:.2f} .. {interval[1]:.2f} %"


if __name__ == "__main__":
    cli.run(main)

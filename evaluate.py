"""Evaluates a checkpoint: python evaluate.py checkpoint=outputs/NAME [data.root=/path/to/imagenet]

Model and data are those of the checkpoint's own config. Every image is counted once, at any number of processes.
"""

import json
from pathlib import Path
from typing import Any, Literal

import hydra
from omegaconf import DictConfig
from rich.table import Table
from torch.distributed.elastic.multiprocessing.errors import record

from contextual_cnn import cli
from contextual_cnn.cli import Group
from contextual_cnn.data import ImageData
from contextual_cnn.distributed import process_group
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.engine.run_folder import start_logging
from contextual_cnn.engine.trainer import TrainerSettings
from contextual_cnn.trained import load_model


def data_overrides(
    *,
    root: str | None = None,
    layout: Literal["auto", "folders", "list", "shards"] | None = None,
    exclude: str | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    threads: int | None = None,
    eval_batch_size: int | None = None,
    on_bad_image: Literal["skip", "stop"] | None = None,
) -> dict[str, Any]:
    """What may differ from the training's data; null keeps its value."""
    return {key: value for key, value in locals().items() if value is not None}


SCHEMA = {
    "checkpoint": str,
    "weights": Literal["auto", "raw", "ema"],
    "device": Literal["auto", "cuda", "cpu"],
    "precision": Literal["auto", "bf16", "fp32"],
    "data": Group(data_overrides),
}


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf" / "evaluate"), config_name="evaluate"
)
@record
@cli.job
def main(hydra_config: DictConfig) -> None:
    config = cli.read_config(hydra_config, SCHEMA)
    trained = load_model(config["checkpoint"], config["weights"], data_overrides(**config["data"]))
    data = ImageData(("val",), trained.classes, **trained.config["data"])

    with process_group(config["device"]) as world:
        console = start_logging(world.is_main)
        data.log_summary()
        model = trained.model.to(world.device)
        batches = data.evaluation_batches(world)
        autocast = TrainerSettings(precision=config["precision"]).autocast(world.device)
        report = evaluate({trained.weights: model}, batches, batches.images, world, autocast)[trained.weights]
        if not world.is_main:
            return
        recalls = [report.pop(name) for name in sorted(report) if name.startswith("recall_stage")]
        report |= {
            "stage_recall": recalls,
            "weights": trained.weights,
            "checkpoint": str(trained.path),
            "step": trained.step,
        }
        _write_json(trained.path.parent, report)
        console.print(_table(trained.config["model"]["name"], report))
        print(f"top-1 {report['top1']:.2f}")


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
    table.add_row("top-5", f"{report['top5']:.2f} %")
    for i, recall in enumerate(report["stage_recall"], start=1):
        table.add_row(f"true class on the shortlist after stage {i}", f"{recall:.2f} %")
    table.add_row("cross-entropy", f"{report['loss']:.4f}")
    table.add_row("images, each counted once", f"{report['images']}")
    if report["bad_images"]:
        table.add_row("of them bad, counted as wrong", f"{report['bad_images']}")
    table.add_row("images/s", f"{report['images_per_second']:.0f}")
    return table


if __name__ == "__main__":
    cli.run(main)

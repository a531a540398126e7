"""Trains a model: python train.py model=contextual_convnext_t data.root=/path/to/imagenet run_name=NAME

The same command again resumes. Under torchrun, on any number of nodes, it is the same command too.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import hydra
import torch
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.errors import record

from contextual_cnn import cli
from contextual_cnn.analysis.curves import plot_curves
from contextual_cnn.cli import Group
from contextual_cnn.data import Augmentation, ImageData
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import World, process_group, same_on_all_ranks, world_size
from contextual_cnn.engine.checkpoint import CheckpointStore
from contextual_cnn.engine.loggers import NullLogger, open_loggers, read_metrics
from contextual_cnn.engine.resume import load_last
from contextual_cnn.engine.run_folder import RunFolder, start_logging
from contextual_cnn.engine.trainer import Trainer, TrainerSettings
from contextual_cnn.errors import UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model, describe
from contextual_cnn.optim import build_optimizer, build_schedule
from contextual_cnn.randomness import Purpose, seed_all

log = logging.getLogger("contextual_cnn.train")

SCHEMA = {
    "run_name": str,
    "output_dir": str,
    "seed": int,
    "resume": Literal["auto", "anyway"],
    "model": Group(build_model, "num_classes"),
    "data": Group(ImageData),
    "augment": Group(Augmentation),
    "loss": Group(StagedCrossEntropy),
    "optimizer": Group(build_optimizer),
    "schedule": Group(build_schedule),
    "trainer": Group(TrainerSettings),
    "checkpoint": Group(CheckpointStore),
    "logger": Group(open_loggers),
}


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="train")
@record  # inside Hydra, or torchrun would not see a failure's traceback
@cli.job
def main(hydra_config: DictConfig) -> None:
    config = cli.read_config(hydra_config, SCHEMA)
    settings = TrainerSettings(**config["trainer"])
    augmentation = Augmentation(**config["augment"])
    data = ImageData(**config["data"])
    config["model"]["num_classes"] = _num_classes(config, data)
    plan = BatchPlan.make(
        images=len(data.sources["train"]),
        global_batch=settings.global_batch_size,
        micro_batch=settings.micro_batch_size,
        world_size=world_size(),
    )
    augmentation.check_micro_batch(plan.micro_batch)
    with process_group(settings.device, settings.timeout_minutes) as world:
        train(config, settings, data, augmentation, plan, world)


def train(
    config: dict[str, Any],
    settings: TrainerSettings,
    data: ImageData,
    augmentation: Augmentation,
    plan: BatchPlan,
    world: World,
) -> None:
    console = start_logging(world.is_main)
    data.log_summary()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    seed_all(Purpose.INITIAL_WEIGHTS, config["seed"])
    model = build_model(**config["model"]).to(world.device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, **config["optimizer"])
    schedule = build_schedule(optimizer, plan.steps_per_epoch, **config["schedule"])

    run = RunFolder(Path(config["output_dir"]) / config["run_name"])
    store = CheckpointStore(run.checkpoints, **config["checkpoint"])
    state = load_last(store, config, data.classes, plan.images, config["resume"])
    if not same_on_all_ranks(state["step"] if state else 0):
        raise UserError(
            f"the processes see different checkpoints in {run.checkpoints}",
            "set output_dir to a folder that all nodes share",
        )
    trainer = Trainer(
        settings,
        model=model,
        loss=StagedCrossEntropy(**config["loss"]),
        optimizer=optimizer,
        schedule=schedule,
        epochs=config["schedule"]["epochs"],
        data=data,
        augmentation=augmentation,
        plan=plan,
        seed=config["seed"],
        world=world,
        store=store,
        config=config,
        state=state,
    )
    if trainer.is_complete:
        log.info(
            "%s is complete: %d steps, best top-1 %.2f; nothing to do",
            run.path,
            trainer.step,
            trainer.best["top1"],
        )
        return

    logger = NullLogger()
    if world.is_main:
        run.prepare(config)
        logger = open_loggers(run.path, config, config["run_name"], trainer.step, **config["logger"])
    log.info("run folder %s, device %s", run.path, world.device)
    log.info("%s", plan)
    log.info("%s: %s", config["model"]["name"], describe(model))
    if config["model"].get("selection") == "reduce":
        log.warning(
            "selection=reduce drops classes for good and collapsed to chance from a random start wherever it was tried "
            "(docs/staged-loss.md); watch the recall per stage, or use model.selection=rerank"
        )
    trainer.fit(logger, console)
    logger.close()
    if world.is_main:
        plot_curves(read_metrics(run.metrics), run.curves, config["run_name"])
        best = trainer.best
        log.info(
            "best top-1 %.2f (%s weights, epoch %d); evaluate it: python evaluate.py checkpoint=%s",
            best["top1"],
            best["weights"],
            best["epoch"],
            run.path,
        )


def _num_classes(config: dict[str, Any], data: ImageData) -> int:
    wanted = config["model"]["num_classes"]
    if wanted is not None and wanted != data.num_classes:
        raise UserError(
            f"model.num_classes={wanted}, but {config['data']['root']} has {data.num_classes} classes",
            "model.num_classes=null takes the number from the data",
        )
    return data.num_classes


if __name__ == "__main__":
    cli.run(main)

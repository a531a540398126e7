"""Trains a model: python train.py model=contextual_convnext_t data.root=/path/to/imagenet run_name=NAME

The same command again resumes. Under torchrun, on any number of nodes, it is the same command too.
Exit status: 0 complete; 75 stopped by a signal or trainer.max_time, to be started again; 2 a mistake to put right.
"""

from contextual_cnn.engine.stopping import end_when_asked

if __name__ == "__main__":  # before the imports, which take seconds
    end_when_asked()

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from contextual_cnn import cli
from contextual_cnn.analysis.curves import plot_curves
from contextual_cnn.analysis.schedule import plot_schedule
from contextual_cnn.cli import Group
from contextual_cnn.data import Augmentation, ImageData
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import World, barrier, process_group, world_size
from contextual_cnn.engine.agreement import check_agreement, digest_code, digest_config, digest_listing, operators
from contextual_cnn.engine.checkpoint_store import CheckpointStore
from contextual_cnn.engine.dry_run import learning_rates, rehearse, report
from contextual_cnn.engine.loggers import NullLogger, check_key, open_loggers, read_metrics
from contextual_cnn.engine.own_files import replaced
from contextual_cnn.engine.resume import load_newest
from contextual_cnn.engine.run_folder import RunFolder, start_logging
from contextual_cnn.engine.stopping import StopRequest, seconds_of
from contextual_cnn.engine.trainer import Trainer
from contextual_cnn.engine.trainer_settings import TrainerSettings
from contextual_cnn.errors import Stopped, UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model, describe
from contextual_cnn.models.preprocessing import warn_of_other_pixels
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
    cli.check_sweep(hydra_config, "run_name")
    config = cli.read_config(hydra_config, SCHEMA)
    cli.check_run_name(config["run_name"])
    if config["seed"] < 0:
        raise UserError(f"seed must be 0 or more, got {config['seed']}", "seed=0")
    settings = TrainerSettings(**config["trainer"])
    check_key(config["logger"].get("wandb"))
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
    request = StopRequest(seconds_of(settings.max_time))
    with process_group(settings.device, settings.timeout_minutes) as world:
        is_complete = train(config, settings, data, augmentation, plan, world, request)
    if not is_complete:
        raise Stopped


def train(
    config: dict[str, Any],
    settings: TrainerSettings,
    data: ImageData,
    augmentation: Augmentation,
    plan: BatchPlan,
    world: World,
    request: StopRequest,
) -> bool:
    """Returns whether the run is complete; if not, it was asked to stop."""
    console = start_logging(world.is_main)
    data.log_summary()
    listing = digest_listing(data.sources["train"])
    facts = {"configuration": digest_config(config), "code": digest_code(), "train images": listing}
    check_agreement(facts | {"val images": digest_listing(data.sources["val"])})
    model, optimizer, schedule = _build(config, settings, plan, world)
    warn_of_other_pixels(model, config["model"].get("weights"), data.pixels)
    check_agreement({"operators": operators(model, world.device)})
    run = RunFolder(Path(config["output_dir"]) / config["run_name"])
    with run.claimed() if world.is_main and not settings.dry_run else nullcontext():
        barrier()  # nobody reads before rank 0 is the only one who may write
        store = CheckpointStore(run.checkpoints, **config["checkpoint"])
        state = load_newest(store, config, data.classes, listing, plan, config["resume"])
        check_agreement({"checkpoint": str(state and state["step"])})
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
            listing=listing,
            state=state,
        )
        if trainer.is_complete:
            log.info(
                "%s is complete: %d steps, best top-1 %.2f; nothing to do",
                run.path,
                trainer.step,
                trainer.best["top1"],
            )
            return True
        if settings.dry_run:
            _dry_run(trainer, run, console)
            return True
        return _fit(trainer, run, console, request)


def _build(
    config: dict[str, Any], settings: TrainerSettings, plan: BatchPlan, world: World
) -> tuple[nn.Module, torch.optim.Optimizer, Scheduler]:
    """What is trained, and by what, before the first step; the same on all ranks."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    seed_all(Purpose.INITIAL_WEIGHTS, config["seed"])
    model = build_model(**config["model"]).to(world.device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, plan.global_batch, **config["optimizer"])
    return model, optimizer, build_schedule(optimizer, plan.steps_per_epoch, **config["schedule"])


def _fit(trainer: Trainer, run: RunFolder, console: Console, request: StopRequest) -> bool:
    """The training itself, in the run's folder; whether it is complete."""
    config, optimizer = trainer.config, trainer.train_step.optimizer
    logger = NullLogger()
    if trainer.world.is_main:
        run.prepare(config)
        logger = open_loggers(run.path, config, config["run_name"], trainer.step, **config["logger"])
    log.info("run folder %s, device %s", run.path, trainer.world.device)
    log.info("%s", trainer.plan)
    log.info("%s: %s", config["model"]["name"], describe(trainer.train_step.module))
    log.info(
        "%s, learning rate up to %.3g; %s schedule of %d epochs, %d of them warm-up",
        config["optimizer"]["name"],
        optimizer.param_groups[0]["initial_lr"],
        *(config["schedule"][key] for key in ("name", "epochs", "warmup_epochs")),
    )
    if config["model"].get("selection") == "reduce":
        log.warning(
            "selection=reduce drops classes for good and collapsed to chance from a random start wherever it was tried "
            "(docs/staged-loss.md); watch the recall per stage, or use model.selection=rerank"
        )
    with request:
        try:
            is_complete = trainer.fit(logger, console, request)
        finally:
            logger.close(in_a_hurry=not trainer.is_complete)
    if not is_complete:
        reason = request.reason or "another process was asked to stop"
        log.info(
            "stopped after step %d: %s; saved in %s; the same command goes on from there",
            *(trainer.step, reason, trainer.store.last),
        )
    elif trainer.world.is_main:
        _conclude(trainer, run)
    return is_complete


def _conclude(trainer: Trainer, run: RunFolder) -> None:
    """The picture of a complete run, and what to do with it."""
    try:
        with replaced(run.curves) as path:
            plot_curves(read_metrics(run.metrics), path, trainer.config["run_name"])
    except OSError as error:  # the training is complete all the same
        log.warning("%s could not be drawn: %s", run.curves, error)
    best = trainer.best
    log.info(
        "best top-1 %.2f (%s weights, epoch %d); evaluate it: python evaluate.py checkpoint=%s",
        best["top1"],
        best["weights"],
        best["epoch"],
        run.path,
    )


def _dry_run(trainer: Trainer, run: RunFolder, console: Console) -> None:
    forecast = rehearse(trainer, run.path)
    if trainer.world.is_main:
        report(trainer, forecast, run.path, console)
        with replaced(run.lr_schedule) as path:
            plot_schedule(learning_rates(trainer), forecast.steps_per_epoch, path, run.path.name)


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

"""A training run: built, resumed, trained to its end or to a stop, and concluded."""

import logging
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from torch import nn

from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import World, barrier, process_group
from contextual_cnn.engine.agreement import check_agreement, digest_code, digest_config, digest_listing, operators
from contextual_cnn.engine.checkpoint_store import CheckpointStore
from contextual_cnn.engine.dry_run import learning_rates, rehearse, report
from contextual_cnn.engine.loggers import MetricsLogger, NullLogger, open_loggers, read_metrics
from contextual_cnn.engine.own_files import replaced
from contextual_cnn.engine.resume import load_newest
from contextual_cnn.engine.run_folder import RunFolder, start_logging
from contextual_cnn.engine.stopping import StopRequest
from contextual_cnn.engine.trainer import Trainer
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model, describe
from contextual_cnn.models.preprocessing import warn_of_other_pixels
from contextual_cnn.optim import build_optimizer, build_schedule
from contextual_cnn.randomness import Purpose, seed_all
from contextual_cnn.settings.run import RunSettings

log = logging.getLogger(__name__)


def train(
    settings: RunSettings, data: ImageData, plan: BatchPlan, request: StopRequest, config: dict[str, Any]
) -> bool:
    """Trains, or resumes, the run of these settings.

    Args:
        config: the settings as they are stored with the run and compared when it is resumed.

    Returns:
        Whether the run is complete; if not, it was asked to stop.
    """
    with process_group(settings.trainer.device, settings.trainer.timeout_minutes) as world:
        console = start_logging(world.is_main)
        data.log_summary()
        listing = digest_listing(data.sources["train"])
        facts = {"configuration": digest_config(config), "code": digest_code(), "train images": listing}
        check_agreement(facts | {"val images": digest_listing(data.sources["val"])})
        model, optimizer, schedule = _build(settings, plan, world)
        warn_of_other_pixels(model, settings.model.weights, data.settings.pixels)
        check_agreement({"operators": operators(model, world.device)})
        run = RunFolder(settings.folder)
        with run.claimed() if world.is_main and not settings.trainer.dry_run else nullcontext():
            barrier()  # nobody reads before rank 0 is the only one who may write
            store = CheckpointStore(run.checkpoints, settings.checkpoint)
            state = load_newest(store, config, data.classes, listing, plan, settings.resume)
            check_agreement({"checkpoint": str(state and state["step"])})
            trainer = Trainer(
                settings.trainer,
                model=model,
                loss=StagedCrossEntropy(settings.loss),
                optimizer=optimizer,
                schedule=schedule,
                epochs=settings.schedule.epochs,
                data=data,
                augment=settings.augment,
                plan=plan,
                seed=settings.seed,
                world=world,
                store=store,
                config=config,
                listing=listing,
                state=state,
            )
            if trainer.is_complete:
                log.info(
                    "%s is complete: %d steps, best top-1 %.2f; nothing to do",
                    *(run.path, trainer.step, trainer.best["top1"]),
                )
                return True
            if settings.trainer.dry_run:
                _dry_run(trainer, run, console)
                return True
            return _fit(settings, trainer, run, console, request)


def _build(settings: RunSettings, plan: BatchPlan, world: World) -> tuple[nn.Module, torch.optim.Optimizer, Scheduler]:
    """What is trained, and by what, before the first step; the same on all ranks."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    seed_all(Purpose.INITIAL_WEIGHTS, settings.seed)
    model = build_model(settings.model).to(world.device)
    if settings.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, settings.optimizer, plan.global_batch)
    return model, optimizer, build_schedule(optimizer, settings.schedule, plan.steps_per_epoch)


def _fit(settings: RunSettings, trainer: Trainer, run: RunFolder, console: Console, request: StopRequest) -> bool:
    """The training itself, in the run's folder; whether it is complete."""
    logger: MetricsLogger = NullLogger()
    if trainer.world.is_main:
        run.prepare(trainer.config)
        logger = open_loggers(run.path, settings.logger, trainer.config, settings.run_name, trainer.step)
    _log_plan(settings, trainer, run)
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
        _conclude(settings, trainer, run)
    return is_complete


def _log_plan(settings: RunSettings, trainer: Trainer, run: RunFolder) -> None:
    log.info("run folder %s, device %s", run.path, trainer.world.device)
    log.info("%s", trainer.plan)
    log.info("%s: %s", settings.model.name, describe(trainer.train_step.module))
    log.info(
        "%s, learning rate up to %.3g; %s schedule of %d epochs, %d of them warm-up",
        settings.optimizer.name,
        trainer.train_step.optimizer.param_groups[0]["initial_lr"],
        *(settings.schedule.name, settings.schedule.epochs, settings.schedule.warmup_epochs),
    )
    if settings.model.selection == "reduce":
        log.warning(
            "selection=reduce drops classes for good and collapsed to chance from a random start wherever it was tried "
            "(docs/staged-loss.md); watch the recall per stage, or use model.selection=rerank"
        )


def _conclude(settings: RunSettings, trainer: Trainer, run: RunFolder) -> None:
    """The picture of a complete run, and what to do with it."""
    from contextual_cnn.analysis.curves import plot_curves  # here: matplotlib takes a second, and many runs never end

    try:
        with replaced(run.curves) as path:
            plot_curves(read_metrics(run.metrics), path, settings.run_name)
    except OSError as error:  # the training is complete all the same
        log.warning("%s could not be drawn: %s", run.curves, error)
    best = trainer.best
    log.info(
        "best top-1 %.2f (%s weights, epoch %d); evaluate it: python evaluate.py checkpoint=%s",
        *(best["top1"], best["weights"], best["epoch"], run.path),
    )


def _dry_run(trainer: Trainer, run: RunFolder, console: Console) -> None:
    forecast = rehearse(trainer, run.path)
    if trainer.world.is_main:
        from contextual_cnn.analysis.schedule import plot_schedule  # here: as matplotlib above

        report(trainer, forecast, run.path, console)
        with replaced(run.lr_schedule) as path:
            plot_schedule(learning_rates(trainer), forecast.steps_per_epoch, path, run.path.name)

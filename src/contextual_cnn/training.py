"""A training run: built, resumed, trained to its end or to a stop, and concluded."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from torch import nn

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.device import set_up_arithmetic, share_compilers
from contextual_cnn.distributed import barrier, process_group
from contextual_cnn.engine.dry_run import learning_rates, print_forecast, rehearse
from contextual_cnn.engine.trainer import Trainer
from contextual_cnn.engine.training_step import TrainingStep
from contextual_cnn.guards.stopping import StopRequest
from contextual_cnn.launcher import cores
from contextual_cnn.models.contextual_conv import operators
from contextual_cnn.optim import build_optimizer, build_schedule
from contextual_cnn.randomness import Purpose, seed_all
from contextual_cnn.runs.agreement import check_agreement, digest_code, digest_config
from contextual_cnn.runs.checkpoint_store import CheckpointStore
from contextual_cnn.runs.loggers import MetricsLogger, NullLogger, open_loggers, read_metrics
from contextual_cnn.runs.own_files import replaced
from contextual_cnn.runs.resume import check_resumed, read_newest
from contextual_cnn.runs.run_folder import RunFolder, start_logging
from contextual_cnn.settings.keys import marked
from contextual_cnn.settings.run import RunSettings
from contextual_cnn.task import Position, Task

log = logging.getLogger(__name__)

_FEWEST_CORES = 4  # that decode images as fast as a GPU trains on them, if barely


def train(settings: RunSettings, task: Task, plan: BatchPlan, request: StopRequest, config: dict[str, Any]) -> bool:
    """Trains, or resumes, the run of these settings.

    Args:
        config: all settings, the task's too, as they are stored with the run and compared when it is resumed.

    Returns:
        Whether the run is complete; if not, it was asked to stop.
    """
    run, record = RunFolder(settings.folder), {"config": config, **task.record()}
    with process_group(settings.trainer.device, settings.trainer.timeout_minutes) as world:
        position, console = Position(plan, settings.seed, world), start_logging(world.is_main)
        task.log_summary()
        facts = {"configuration": digest_config(config, _keys("by_node", settings, task)), "code": digest_code()}
        check_agreement(facts | task.facts())
        model, optimizer, schedule = _build(settings, task, position)
        check_agreement({"operators": operators(model, world.device)})
        with run.claimed() if world.is_main and not settings.trainer.dry_run else nullcontext():
            barrier()  # nobody reads before rank 0 is the only one who may write
            store = CheckpointStore(run.checkpoints, settings.checkpoint)
            free = _keys("may_change", settings, task)
            state = check_resumed(read_newest(store, world), record, plan, settings.resume, free)
            check_agreement({"checkpoint": str(state and state["step"])})
            train_step = TrainingStep(settings.trainer, task, model, optimizer, schedule, position, state)
            trainer = Trainer(settings.trainer, task, train_step, store, settings.schedule.epochs, record, state)
            del state  # as large as the model and its moments, in every process
            if trainer.is_complete:
                best = f"best {task.best.label} {trainer.best[task.best.name]:.2f}"
                log.info("%s is complete: %d steps, %s; nothing to do", run.path, trainer.step, best)
            elif settings.trainer.dry_run:
                _rehearse(trainer, run, console)
            else:
                with _logger(settings, trainer, run) as logger, request:
                    is_complete = trainer.fit(logger, console, request)
                _conclude(settings, trainer, run) if is_complete else _log_stop(trainer, request)
                return is_complete
            return True


def _keys(mark: str, settings: RunSettings, task: Task) -> tuple[str, ...]:
    """The keys with a mark, of all groups."""
    return (*marked(type(settings), mark), *marked(type(task.settings), mark))


def _build(settings: RunSettings, task: Task, position: Position) -> tuple[nn.Module, torch.optim.Optimizer, Scheduler]:
    """What is trained, and by what, before the first step; the same on all ranks."""
    set_up_arithmetic()
    share_compilers()
    seed_all(Purpose.INITIAL_WEIGHTS, settings.seed)
    model = task.build_model().to(position.world.device)
    if settings.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, settings.optimizer, position.plan.global_batch)
    schedule = build_schedule(optimizer, settings.schedule, position.plan.steps_per_epoch)
    return model, optimizer, schedule


@contextmanager
def _logger(settings: RunSettings, trainer: Trainer, run: RunFolder) -> Iterator[MetricsLogger]:
    """Rank 0's loggers, once the run's folder and its log say what the run is."""
    logger: MetricsLogger = NullLogger()
    config = trainer.record["config"]
    if trainer.world.is_main:
        run.prepare(config)
        logger = open_loggers(run.path, settings.logger, config, settings.run_name, trainer.step)
    log.info("run folder %s, device %s", run.path, trainer.world.device)
    if trainer.world.device.type == "cuda" and cores() < _FEWEST_CORES:
        log.warning("a process has %d CPU cores: they will not feed a GPU (on SLURM: --cpus-per-task)", cores())
    if settings.trainer.compiles_on(trainer.world.device.type):
        log.info("the first step compiles the model, for a minute or two (trainer.compile=false begins at once)")
    log.info("%s", trainer.plan)
    log.info("%s", trainer.task.describe(trainer.train_step.module))
    if remark := trainer.train_step.remark_on_norms():
        log.warning("%s", remark)
    log.info(
        "%s, learning rate up to %.3g; %s schedule of %d epochs, %s of them warm-up",
        settings.optimizer.name,
        trainer.train_step.optimizer.param_groups[0]["initial_lr"],
        *(settings.schedule.name, settings.schedule.epochs, settings.schedule.warmup),
    )
    try:
        yield logger
    finally:
        logger.close(in_a_hurry=not trainer.is_complete)


def _log_stop(trainer: Trainer, request: StopRequest) -> None:
    log.info(
        "stopped after step %d: %s; saved in %s; the same command goes on from there",
        *(trainer.step, request.reason or "another process was asked to stop", trainer.store.last),
    )


def _conclude(settings: RunSettings, trainer: Trainer, run: RunFolder) -> None:
    """The picture of a complete run, and what to do with it."""
    if not trainer.world.is_main:
        return
    from contextual_cnn.analysis.curves import plot_curves  # here: matplotlib takes a second, and many runs never end

    try:
        with replaced(run.curves) as path:
            plot_curves(read_metrics(run.metrics), path, settings.run_name)
    except OSError as error:  # the training is complete all the same
        log.warning("%s could not be drawn: %s", run.curves, error)
    metric, best = trainer.task.best, trainer.best
    log.info(
        "best %s %.2f (%s weights, epoch %d); evaluate it: python evaluate.py checkpoint=%s",
        *(metric.label, best[metric.name], best["weights"], best["epoch"], run.path),
    )


def _rehearse(trainer: Trainer, run: RunFolder, console: Console) -> None:
    """The dry run: a few steps, and what they foretell."""
    forecast = rehearse(trainer, run.path)
    if trainer.world.is_main:
        from contextual_cnn.analysis.lr_curve import plot_schedule  # here: as matplotlib above

        print_forecast(trainer, forecast, run.path, console)
        with replaced(run.lr_schedule) as path:
            plot_schedule(learning_rates(trainer), forecast.steps_per_epoch, path, run.path.name)

"""The training loop: steps of accumulated micro-batches, an evaluation and a checkpoint after each epoch.

It can be left after any step, and goes on from there as if it had not been left.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch import nn

from contextual_cnn.contracts import by_stage
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.mixing import BatchAugmentation
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import AnyRank, World, barrier
from contextual_cnn.engine.autocast import autocast
from contextual_cnn.engine.checkpoint_store import CheckpointStore
from contextual_cnn.engine.evaluator import EvaluationStopped, evaluate
from contextual_cnn.engine.loggers import MetricsLogger
from contextual_cnn.engine.memory import GrowthWatch, resident_gib
from contextual_cnn.engine.progress import ProgressDisplay, describe_evaluation
from contextual_cnn.engine.stopping import StopRequest
from contextual_cnn.engine.training_step import TrainingStep
from contextual_cnn.engine.watchdog import Watchdog
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.trainer import TrainerSettings

if TYPE_CHECKING:
    from contextual_cnn.data.dali import EvaluationBatches

log = logging.getLogger(__name__)

_MOST_ROLLBACKS = 3
_MOST_DATA_WAIT = 20  # percent of the time


class Trainer:
    """One run, from where its state is to the last step.

    Args:
        model: on the device, without DDP or compilation around it.
        state: of a checkpoint to go on from, or None.
        config, listing: stored in the checkpoints, as plain containers; to know the run and its data by.
        epochs: of the schedule.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        model: nn.Module,
        loss: StagedCrossEntropy,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        epochs: int,
        data: ImageData,
        augment: AugmentSettings,
        plan: BatchPlan,
        seed: int,
        world: World,
        store: CheckpointStore,
        config: dict[str, Any],
        listing: str,
        state: dict[str, Any] | None,
    ) -> None:
        self.settings, self.world, self.plan, self.seed = settings, world, plan, seed
        self.data, self.augment, self.store = data, augment, store
        self.config, self.listing = config, listing
        whole = epochs * plan.steps_per_epoch
        self.last_step = min(whole, settings.max_steps or whole)
        self.step = 0
        self.best: dict[str, Any] = {"top1": -1.0, "epoch": 0, "weights": "raw"}
        self._ended_step = 0  # the last step after which the end of an epoch has been dealt with
        self._watchdog, self._phase = Watchdog(60 * settings.timeout_minutes, world.rank), "start"
        self._watches_stalls, self._warned_of_stalls = False, False
        self._skipping, self._rollbacks, self._rolled_back_at = False, 0, -settings.max_skipped_steps
        if state is not None:
            self.step, self.best, self._ended_step = state["step"], state["best"], state["ended_step"]
        self.train_step = TrainingStep(
            settings,
            model=model,
            loss=loss,
            optimizer=optimizer,
            schedule=schedule,
            augment=BatchAugmentation(augment, data.num_classes),
            plan=plan,
            seed=seed,
            world=world,
            state=state,
        )
        self.meter, self._memory = self.train_step.meter, GrowthWatch()

    def fit(self, logger: MetricsLogger, console: Console, request: StopRequest) -> bool:
        """Trains until the run is complete, or until a process is asked to stop; then everything is saved.

        Returns:
            Whether the run is complete; the same on all ranks.

        Raises:
            UserError: the last checkpoint could not be written, or the gradients stay non-finite.
        """
        try:
            with self._watchdog:
                return self._fit(logger, console, request)
        except RuntimeError as error:
            error.add_note(f"in the {self._phase} after step {self.step}")
            raise
        finally:
            self.store.wait()  # the run folder is another process's after this

    def _fit(self, logger: MetricsLogger, console: Console, request: StopRequest) -> bool:
        batches = self.data.train_batches(self.plan, self.augment, self.seed, self.world, self.step)
        val_batches = self.data.evaluation_batches(self.world)
        first_step, any_rank = self.step, AnyRank()
        stopping = False
        self.train_step.module.train()
        self.meter.restart_clock()
        with ProgressDisplay(console, self.last_step, self.plan.steps_per_epoch, self.step) as progress:
            while True:
                if self._owes_epoch_end and not stopping:
                    stopping = not self._end_epoch(val_batches, logger, request)
                if stopping or self.is_complete:
                    break
                self._enter("training")
                self.train_step(self.step, batches)
                self.step += 1
                request.protect()
                if self.world.is_main and self.step == first_step + 1:  # the optimizer's state is there now
                    self.store.warn_of_little_room(self._state())
                progress.advance(self.step)
                stopping = any_rank(request.reason is not None)
                if stopping or self._owes_epoch_end or self.step % self.settings.log_every == 0:
                    self._log_step(logger, progress)
                    self._save_inside_epoch()
        if stopping and self.world.is_main:
            self.store.save(self._state())
        self.store.close()
        return not stopping

    def _enter(self, phase: str) -> None:
        """The run has got on; what an error is noted to have happened in."""
        self._phase = phase
        self._watchdog.beat(f"the {phase} after step {self.step}")

    @property
    def is_complete(self) -> bool:
        return self.step >= self.last_step and not self._owes_epoch_end

    @property
    def _owes_epoch_end(self) -> bool:
        """Whether the run stands at an end of an epoch that has not been evaluated and saved."""
        at_end = self.step % self.plan.steps_per_epoch == 0 or self.step >= self.last_step
        return at_end and self.step != self._ended_step

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.step // self.plan.steps_per_epoch

    @property
    def _is_sound(self) -> bool:
        """Whether the weights look like something to go back to: a rollback must not end where it began."""
        return not self._skipping and self.step - self._rolled_back_at > self.settings.max_skipped_steps

    def _log_step(self, logger: MetricsLogger, progress: ProgressDisplay) -> None:
        """Reads and shows the metrics; the one place in the loop that waits for the device.

        Raises:
            UserError: losses or gradients have not been finite for too long.
        """
        measured, skipped_in_a_row = self.meter.read()
        measured["lr"] = self.train_step.lr
        measured["epoch"] = self.step / self.plan.steps_per_epoch
        metrics = {f"train/{name}": value for name, value in measured.items()}
        logger.log(self.step, metrics)
        progress.report(self.step, metrics)
        self._warn_of_stalls(measured["data_wait"])
        self._skipping = skipped_in_a_row > 0
        patience = 1 if self.settings.on_nonfinite == "stop" else self.settings.max_skipped_steps
        if skipped_in_a_row < patience:
            return
        if self.settings.on_nonfinite == "rollback" and self._roll_back():
            return
        first = self.step - skipped_in_a_row
        batches = self.data.train_batches(self.plan, self.augment, self.seed, self.world, first)
        raise self.train_step.nonfinite_error(first, batches, skipped_in_a_row, self.store.folder.parent / "nonfinite")

    def _warn_of_stalls(self, data_wait: float) -> None:
        """Once; the figure is in every line of the log."""
        is_stall = data_wait > _MOST_DATA_WAIT and self._watches_stalls
        self._watches_stalls = True  # until the first log step the pipelines start
        if is_stall and self.world.is_main and not self._warned_of_stalls:
            log.warning(
                "step %d: %.0f %% of the time went by in waiting for images; more data.threads, a faster disk or "
                "smaller images would help",
                *(self.step, data_wait),
            )
            self._warned_of_stalls = True

    def _roll_back(self) -> bool:
        """Weights and averages of the newest checkpoint, at the step where the run is; False if that cannot be done.

        The step goes on: the data that led here are not repeated, and no later draw changes.
        """
        if self._rollbacks == _MOST_ROLLBACKS:
            return False
        self.store.wait()
        barrier()  # nobody reads before rank 0 has written
        newest = self.store.newest()
        if newest is None:
            return False
        path, state = newest
        log.warning(
            "step %d: the gradients stay non-finite; back to the weights of %s, of step %d, and on "
            "with the data that follow",
            self.step,
            path,
            state["step"],
        )
        self.train_step.restore(state)
        self.meter.skipped_in_a_row.zero_()
        self._rollbacks, self._rolled_back_at, self._skipping = self._rollbacks + 1, self.step, False
        return True

    def _save_inside_epoch(self) -> None:
        """Where an epoch ends, that is saved with its evaluation."""
        if self.world.is_main and not self._owes_epoch_end and self._is_sound and self.store.is_due(self.step):
            self.store.save(self._state())

    def _end_epoch(self, val_batches: "EvaluationBatches", logger: MetricsLogger, request: StopRequest) -> bool:
        """Evaluates, logs and saves, as far as it is this epoch's turn; False if a request to stop cut that short."""
        is_last = self.step >= self.last_step
        is_best = False
        if is_last or self.epoch % self.settings.eval_every == 0:
            try:
                metrics, is_best = self._evaluate(val_batches, request)
            except EvaluationStopped:
                return False
            logger.log(self.step, metrics)
        self._ended_step = self.step
        self._memory.look(resident_gib())
        is_due = is_last or is_best or (self.epoch % self.store.settings.every_epochs == 0 and self._is_sound)
        if self.world.is_main and is_due:
            self.store.save(self._state(), is_best=is_best)
        self.meter.restart_clock()
        return True

    def _evaluate(self, val_batches: "EvaluationBatches", request: StopRequest) -> tuple[dict[str, float], bool]:
        models = {"raw": self.train_step.module}
        self._enter("evaluation")
        if self.train_step.ema is not None:
            models["ema"] = self.train_step.ema.module
        if self.world.size > 1:
            # Running statistics of batch norms differ from rank to rank. Those of rank 0 count, as in DDP's forward
            # and in a checkpoint: so a run that goes on from one ends with the same bits
            for model in models.values():
                distribute_bn(model, self.world.size, reduce=False)
        precision = autocast(self.settings.precision, self.world.device)

        def should_stop() -> bool:
            self._enter("evaluation")
            return request.reason is not None

        reports = evaluate(models, val_batches, val_batches.images, self.world, precision, should_stop)
        epoch = -(-self.step // self.plan.steps_per_epoch)  # the one that the step belongs to, counted from 1
        weights = max(reports, key=lambda name: reports[name]["top1"])
        is_best = reports[weights]["top1"] > self.best["top1"]
        if is_best:
            self.best = {"top1": reports[weights]["top1"], "epoch": epoch, "weights": weights}
        log.info("epoch %d evaluated: %s%s", epoch, describe_evaluation(reports), "  (best so far)" if is_best else "")
        self._warn_of_collapse(reports["raw"])
        prefixes = {"raw": "val", "ema": "val_ema"}
        metrics = {
            f"{prefixes[name]}/{key}": value for name, report in reports.items() for key, value in report.items()
        }
        return metrics, is_best

    def _warn_of_collapse(self, report: dict[str, float]) -> None:
        """A staged loss can fall by losing targets; a shortlist no better than a random one shows it."""
        counts = getattr(self.train_step.module, "shortlist_sizes", {})
        for stage, recall in by_stage(report, "recall").items():
            chance = 100 * counts[stage] / self.data.num_classes
            if recall < 1.1 * chance and chance < 90:
                log.warning(
                    "the shortlist after stage %d holds the true class in %.1f %% of the val images, "
                    "a random one would in %.1f %%",
                    *(stage, recall, chance),
                )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "ended_step": self._ended_step,
            **self.train_step.state(),
            "best": self.best,
            "config": self.config,
            "classes": list(self.data.classes),
            "images": self.plan.images,
            "listing": self.listing,
            "batches": [self.plan.world_size, self.plan.micro_batch],
        }

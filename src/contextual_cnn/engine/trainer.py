"""The training loop: steps of accumulated micro-batches, an evaluation and a checkpoint after each epoch.

It can be left after any step, and goes on from there as if it had not been left.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from contextual_cnn.distributed import AnyRank, barrier
from contextual_cnn.engine.evaluator import EvaluationStopped, evaluate
from contextual_cnn.engine.progress import ProgressDisplay, describe_speed
from contextual_cnn.engine.training_step import TrainingStep
from contextual_cnn.guards.memory import GrowthWatch, explained_shortage, resident_gib
from contextual_cnn.guards.skipped_steps import SkippedSteps
from contextual_cnn.guards.stalls import StallWatch
from contextual_cnn.guards.stopping import StopRequest
from contextual_cnn.guards.watchdog import Watchdog
from contextual_cnn.runs.checkpoint_store import CheckpointStore
from contextual_cnn.runs.loggers import MetricsLogger
from contextual_cnn.runs.resume import read_newest
from contextual_cnn.settings.trainer import TrainerSettings
from contextual_cnn.task import Evaluation, Task

log = logging.getLogger(__name__)


class Trainer:
    """One run, from where its state is to the last step.

    Args:
        train_step: restored from the state.
        epochs: of the schedule.
        record: what every checkpoint holds beside the state, to know the run and its data by.
        state: of a checkpoint to go on from, or None.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        task: Task,
        train_step: TrainingStep,
        store: CheckpointStore,
        epochs: int,
        record: dict[str, Any],
        state: dict[str, Any] | None,
    ) -> None:
        self.settings, self.task, self.train_step, self.store = settings, task, train_step, store
        self.position, self.meter, self.record = train_step.position, train_step.meter, record
        self.plan, self.world = self.position.plan, self.position.world
        whole = epochs * self.plan.steps_per_epoch
        self.last_step = min(whole, settings.max_steps or whole)
        self.step = 0
        self.best: dict[str, Any] = {task.best.name: task.best.least, "epoch": 0, "weights": "raw"}
        self._ended_step = 0  # the last step after which the end of an epoch has been dealt with
        if state is not None:
            self.step, self.best, self._ended_step = state["step"], state["best"], state["ended_step"]
        # After those that wait for this process have given it up, and before NCCL would end it
        timeout = 60 * settings.timeout_minutes
        self._watchdog, self._phase = Watchdog(timeout + min(30, timeout / 4), self.world.rank), "start"
        self._stalls, self._skipped, self._memory = StallWatch(), SkippedSteps(settings), GrowthWatch()

    def fit(self, logger: MetricsLogger, console: Console, request: StopRequest) -> bool:
        """Trains until the run is complete, or until a process is asked to stop; then everything is saved.

        Returns:
            Whether the run is complete; the same on all ranks.

        Raises:
            UserError: the last checkpoint could not be written, or the gradients stay non-finite.
        """
        with self._watched():
            batches = self.task.batches(self.position.at(self.step))
            with explained_shortage(self.world, self.plan, self.step):
                evaluation = self.task.evaluation(self.world)
            first_step, any_rank = self.step, AnyRank()
            stopping = False
            self.train_step.module.train()
            self.meter.restart_clock()
            with ProgressDisplay(console, self.last_step, self.plan.steps_per_epoch, self.step) as progress:
                while True:
                    if self._owes_epoch_end and not stopping:
                        stopping = not self._end_epoch(evaluation, logger, request)
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

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            with self._watchdog:
                yield
        except RuntimeError as error:
            error.add_note(f"in the {self._phase} after step {self.step}")
            raise
        finally:
            self.store.wait()  # the run folder is another process's after this

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

    def _log_step(self, logger: MetricsLogger, progress: ProgressDisplay) -> None:
        """Reads and shows the metrics; the one place in the loop that waits for the device.

        Raises:
            UserError: losses or gradients have not been finite for too long.
        """
        measured, skipped_in_a_row = self.meter.read()
        measured["lr"] = self.train_step.lr
        measured["epoch"] = self.step / self.plan.steps_per_epoch
        logger.log(self.step, {f"train/{name}": value for name, value in measured.items()})
        progress.report(self.step, self.task.describe_step(measured), measured)
        if self.world.is_main:
            self._stalls.look(self.step, measured["data_wait"])
        verdict = self._skipped.look(skipped_in_a_row)
        if verdict == "continue" or (verdict == "roll back" and self._roll_back()):
            return
        first = self.step - skipped_in_a_row
        batches = self.task.batches(self.position.at(first))
        raise self.train_step.nonfinite_error(first, batches, skipped_in_a_row, self.store.folder.parent / "nonfinite")

    def _roll_back(self) -> bool:
        """Weights and averages of the newest checkpoint, at the step where the run is; False if there is none.

        The step goes on: the data that led here are not repeated, and no later draw changes.
        """
        self.store.wait()
        barrier()  # nobody reads before rank 0 has written
        newest = read_newest(self.store, self.world)
        if newest is None:
            return False
        path, state = newest
        log.warning(
            "step %d: the gradients stay non-finite; back to the weights of %s, of step %d, and on "
            "with the data that follow",
            *(self.step, path, state["step"]),
        )
        self.train_step.restore(state)
        self.meter.skipped_in_a_row.zero_()
        self._skipped.rolled_back(self.step)
        return True

    def _save_inside_epoch(self) -> None:
        """Where an epoch ends, that is saved with its evaluation."""
        is_due = self._skipped.is_sound(self.step) and self.store.is_due(self.step)
        if self.world.is_main and not self._owes_epoch_end and is_due:
            self.store.save(self._state())

    def _end_epoch(self, evaluation: Evaluation, logger: MetricsLogger, request: StopRequest) -> bool:
        """Evaluates, logs and saves, as far as it is this epoch's turn; False if a request to stop cut that short."""
        is_last = self.step >= self.last_step
        is_best = False
        if is_last or self.epoch % self.settings.eval_every == 0:
            try:
                metrics, is_best = self._evaluate(evaluation, request)
            except EvaluationStopped:
                return False
            logger.log(self.step, metrics)
        self._ended_step = self.step
        is_turn = self.epoch % self.store.settings.every_epochs == 0 and self._skipped.is_sound(self.step)
        if self.world.is_main and (is_last or is_best or (is_turn and self.store.can_afford())):
            self.store.save(self._state(), is_best=is_best)
        self._memory.look(resident_gib())  # after the first save, whose copy stays
        self.meter.restart_clock()
        return True

    def _evaluate(self, evaluation: Evaluation, request: StopRequest) -> tuple[dict[str, float], bool]:
        self._enter("evaluation")
        self.train_step.agree_on_buffers()
        models, calls = self.train_step.evaluated(), self.train_step.evaluated_calls()

        def should_stop() -> bool:
            self._enter("evaluation")
            return request.reason is not None

        with explained_shortage(self.world, self.plan, self.step):
            reports = evaluate(models, calls, evaluation, self.world, should_stop)
        is_best = self._compare(reports)
        for remark in self.task.remarks(self.train_step.module, reports["raw"]):
            log.warning("%s", remark)
        prefixes = {"raw": "val", "ema": "val_ema"}
        metrics = {
            f"{prefixes[name]}/{key}": value for name, report in reports.items() for key, value in report.items()
        }
        return metrics, is_best

    def _compare(self, reports: dict[str, dict[str, float]]) -> bool:
        """Whether these weights are the best so far, of which a record is kept."""
        epoch = -(-self.step // self.plan.steps_per_epoch)  # the one that the step belongs to, counted from 1
        name = self.task.best.name
        weights = max(reports, key=lambda weights: reports[weights][name])
        is_best = reports[weights][name] > self.best[name]
        if is_best:
            self.best = {name: reports[weights][name], "epoch": epoch, "weights": weights}
        told = f"{self.task.describe_evaluation(reports)}, {describe_speed(reports['raw'])}"
        log.info("epoch %d evaluated: %s%s", epoch, told, "  (best so far)" if is_best else "")
        return is_best

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "ended_step": self._ended_step,
            **self.train_step.state(),
            "best": self.best,
            **self.record,
            "batches": [self.plan.world_size, self.plan.micro_batch],
        }

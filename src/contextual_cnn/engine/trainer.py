"""The training loop: steps of accumulated micro-batches, an evaluation and a checkpoint after each epoch.

It can be left after any step, and goes on from there as if it had not been left.
"""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contextual_cnn.contracts import Batch, StagedLoss, StagedScores
from contextual_cnn.data import Augmentation, ImageData
from contextual_cnn.data.augmentation import BatchAugmentation
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import AnyRank, World, barrier
from contextual_cnn.engine.checkpoint_store import CheckpointStore
from contextual_cnn.engine.evaluator import EvaluationStopped, evaluate
from contextual_cnn.engine.loggers import MetricsLogger
from contextual_cnn.engine.memory import GrowthWatch, out_of_memory, resident_gib
from contextual_cnn.engine.nonfinite import explain_nonfinite
from contextual_cnn.engine.progress import ProgressDisplay, describe_evaluation
from contextual_cnn.engine.stopping import StopRequest, seconds_of
from contextual_cnn.engine.train_meter import TrainMeter
from contextual_cnn.errors import UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.optim import Clipping, clip_gradients, step_if_finite
from contextual_cnn.randomness import Purpose, seed_all

if TYPE_CHECKING:
    from contextual_cnn.data.dali import EvaluationBatches

log = logging.getLogger(__name__)

_MOST_ROLLBACKS = 3


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How the loop runs; nothing here is about the model.

    device: "auto" takes a GPU where there is one.
    precision: "auto" is bfloat16 autocast on a GPU and float32 on a CPU.
    global_batch_size: images per optimizer step over all processes (paper: 4096).
    micro_batch_size: images per process and forward pass; the accumulation follows from it.
    ema_decay: per optimizer step; null keeps no average. Evaluated beside the raw weights.
    ema_warmup: lets the decay grow to its value, for runs too short for it.
    grad_clip: largest norm of the gradient; null does not clip.
    grad_clip_mode: "value" limits each entry instead, "agc" each unit by its weights (see `clip_gradients`).
    max_steps: ends the run early, without bending the schedule.
    max_time: ends the run in order after "hours:minutes:seconds", or a number of hours, of this process;
        the same command goes on.
    on_nonfinite: a step whose loss or gradient is not finite is skipped in any case. "skip" stops the run after
        max_skipped_steps of them in a row, "rollback" then goes back to the weights of the newest checkpoint and on
        with the data that follow, and "stop" takes no further step after the first and stops when it is noticed,
        which is when metrics are logged.
    max_skipped_steps: see on_nonfinite.
    timeout_minutes: how long a process waits for one that does not answer.
    dry_run: takes a few steps, tells what the whole run will need, and leaves everything as it was.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    global_batch_size: int = 4096
    micro_batch_size: int = 128
    channels_last: bool = True
    compile: bool = False
    ema_decay: float | None = 0.9999
    ema_warmup: bool = False
    grad_clip: float | None = None
    grad_clip_mode: Clipping = "norm"
    max_steps: int | None = None
    max_time: str | float | None = None
    on_nonfinite: Literal["skip", "stop", "rollback"] = "skip"
    max_skipped_steps: int = 10
    log_every: int = 50
    eval_every: int = 1
    timeout_minutes: float = 10
    dry_run: bool = False

    def __post_init__(self) -> None:
        for key in ("log_every", "eval_every", "max_skipped_steps", "max_steps"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"trainer.{key} must be 1 or more, got {getattr(self, key)}", f"trainer.{key}=1")
        seconds_of(self.max_time)
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise UserError(f"trainer.grad_clip must be above 0, got {self.grad_clip}", "trainer.grad_clip=null is off")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(
                f"trainer.ema_decay must be at least 0 and below 1, got {self.ema_decay}",
                "trainer.ema_decay=0.9999",
            )

    def autocast(self, device: torch.device):
        """The autocast context of this precision on this device; may be entered again and again."""
        bf16 = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


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
        augmentation: Augmentation,
        plan: BatchPlan,
        seed: int,
        world: World,
        store: CheckpointStore,
        config: dict[str, Any],
        listing: str,
        state: dict[str, Any] | None,
    ) -> None:
        self.settings, self.world, self.plan, self.seed = settings, world, plan, seed
        self.data, self.augmentation, self.store = data, augmentation, store
        self.config, self.listing = config, listing
        self.module, self.loss, self.optimizer, self.schedule = model, loss, optimizer, schedule
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=settings.ema_warmup)
        whole = epochs * plan.steps_per_epoch
        self.last_step = min(whole, settings.max_steps or whole)
        self.step, self.best = 0, {"top1": -1.0, "epoch": 0, "weights": "raw"}
        self._ended_step = 0  # the last step after which the end of an epoch has been dealt with
        self._skipping, self._rollbacks, self._rolled_back_at = False, 0, -settings.max_skipped_steps
        if state is not None:
            self._restore(state)
        # Wrapped last: the EMA copy and the checkpoints see the bare module, whose names have no prefix
        self.model = torch.compile(model) if settings.compile else model
        if world.size > 1:
            self.model = DistributedDataParallel(
                self.model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                static_graph=plan.accumulation == 1,  # with no_sync in the first step it fails inside torch
            )
        self.augment = BatchAugmentation(augmentation, data.num_classes)
        self.meter = TrainMeter(world)
        self._memory = GrowthWatch()

    def fit(self, logger: MetricsLogger, console: Console, request: StopRequest) -> bool:
        """Trains until the run is complete, or until a process is asked to stop; then everything is saved.

        Returns:
            Whether the run is complete; the same on all ranks.

        Raises:
            UserError: the last checkpoint could not be written, or the gradients stay non-finite.
        """
        batches = self.data.train_batches(self.plan, self.augmentation, self.seed, self.world, self.step)
        val_batches = self.data.evaluation_batches(self.world)
        any_rank = AnyRank()
        stopping = False
        self.module.train()
        self.meter.restart_clock()
        with ProgressDisplay(console, self.last_step, self.plan.steps_per_epoch, self.step) as progress:
            while True:
                if self._owes_epoch_end and not stopping:
                    stopping = not self._end_epoch(val_batches, logger, request)
                if stopping or self.is_complete:
                    break
                try:
                    self.train_step(batches)
                except torch.OutOfMemoryError as error:
                    raise out_of_memory(self.world, self.plan, self.step) from error
                progress.advance(self.step)
                stopping = any_rank(request.reason is not None)
                if stopping or self._owes_epoch_end or self.step % self.settings.log_every == 0:
                    self._log_step(logger, progress)
                    self._save_inside_epoch()
        if stopping and self.world.is_main:
            self.store.save(self._state())
        self.store.close()
        return not stopping

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

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: accumulate, guard, step, average."""
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for accumulated in range(self.plan.accumulation):
            with self.meter.waiting_for_data():
                batch = next(batches)
            batch = self._augment(batch, self.step, accumulated)
            self._accumulate(batch, last=accumulated == self.plan.accumulation - 1)
        norm = clip_gradients(self.module, self.settings.grad_clip, self.settings.grad_clip_mode)
        finite = torch.isfinite(norm)  # of the reduced gradient, hence the same on all ranks
        if self.settings.on_nonfinite == "stop":
            finite = finite & (self.meter.skipped_in_a_row == 0)  # the first one to be skipped is the last one
        step_if_finite(self.optimizer, finite)
        if self.ema is not None:
            self.ema.update(self.module, step=self.step + 1 if self.settings.ema_warmup else None)
        self.meter.add_step(norm, finite)
        self.meter.add_bad_images(self.data.bad_images.take_replaced())
        self.step += 1

    def _augment(self, batch: Batch, step: int, accumulated: int) -> Batch:
        """All that is drawn for a micro-batch hangs on its number, not on who computes it or what came before."""
        seed_all(Purpose.MICRO_BATCH, self.seed, self.plan.micro_batch_number(step, accumulated, self.world.rank))
        return self.augment(batch)

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[StagedScores, StagedLoss]:
        images = batch.images
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.settings.autocast(self.world.device):
            scores = StagedScores.of(model(images))
        return scores, self.loss(scores, batch.targets)

    def _accumulate(self, batch: Batch, last: bool) -> None:
        """Forward and backward of one micro-batch; gradients cross the ranks with the last one only."""
        with self.model.no_sync() if self.world.size > 1 and not last else nullcontext():
            scores, loss = self._forward(self.model, batch)
            # An infinite loss may have finite gradients: made NaN, they reach all ranks, which skip the step alike
            is_finite = torch.isfinite(loss.total.detach())
            loss.total.backward(torch.where(is_finite, 1 / self.plan.accumulation, torch.nan))
        self.meter.add_micro_batch(scores, loss, batch.targets)

    def _log_step(self, logger: MetricsLogger, progress: ProgressDisplay) -> None:
        """Reads and shows the metrics; the one place in the loop that waits for the device.

        Raises:
            UserError: losses or gradients have not been finite for too long.
        """
        measured, skipped_in_a_row = self.meter.read()
        measured["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        measured["epoch"] = self.step / self.plan.steps_per_epoch
        metrics = {f"train/{name}": value for name, value in measured.items()}
        logger.log(self.step, metrics)
        progress.report(self.step, metrics)
        self._skipping = skipped_in_a_row > 0
        patience = 1 if self.settings.on_nonfinite == "stop" else self.settings.max_skipped_steps
        if skipped_in_a_row < patience:
            return
        if self.settings.on_nonfinite == "rollback" and self._roll_back():
            return
        raise self._nonfinite_error(self.step - skipped_in_a_row, skipped_in_a_row)

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
        self._restore_weights(state)
        self.meter.skipped_in_a_row.zero_()
        self._rollbacks, self._rolled_back_at, self._skipping = self._rollbacks + 1, self.step, False
        return True

    def _nonfinite_error(self, step: int, skipped: int) -> UserError:
        """What the first of the skipped steps looks like: computed again, which gives the same draws and weights."""
        self.schedule.step_update(step)
        batches = self.data.train_batches(self.plan, self.augmentation, self.seed, self.world, step)
        prepared = (self._augment(next(batches), step, i) for i in range(self.plan.accumulation))
        found = explain_nonfinite(
            ((batch, lambda batch=batch: self._forward(self.module, batch)[1]) for batch in prepared),
            folder=self.store.folder.parent / "nonfinite",
            step=step,
            lr=max(group["lr"] for group in self.optimizer.param_groups),
            world=self.world,
        )
        return UserError(
            f"loss or gradients were not finite for {skipped} steps from step {step + 1} on ({found}); "
            "they changed no weight",
            "try a smaller optimizer.lr, trainer.grad_clip=1.0, trainer.precision=fp32 or "
            "trainer.on_nonfinite=rollback, under a new run_name",
        )

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
        is_due = is_last or is_best or (self.epoch % self.store.every_epochs == 0 and self._is_sound)
        if self.world.is_main and is_due:
            self.store.save(self._state(), is_best=is_best)
        self.meter.restart_clock()
        return True

    def _evaluate(self, val_batches: "EvaluationBatches", request: StopRequest) -> tuple[dict[str, float], bool]:
        models = {"raw": self.module} | ({"ema": self.ema.module} if self.ema is not None else {})
        if self.world.size > 1:
            for model in models.values():  # running statistics of batch norms differ from rank to rank
                distribute_bn(model, self.world.size, reduce=True)
        autocast = self.settings.autocast(self.world.device)
        reports = evaluate(
            models, val_batches, val_batches.images, self.world, autocast, lambda: request.reason is not None
        )
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
        counts = getattr(self.module, "shortlist_sizes", ())
        for i, count in enumerate(counts, start=1):
            recall, chance = report[f"recall_stage{i}"], 100 * count / self.data.num_classes
            if recall < 1.1 * chance and chance < 90:
                log.warning(
                    "the shortlist after stage %d holds the true class in %.1f %% of the val images, "
                    "a random one would in %.1f %%",
                    *(i, recall, chance),
                )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "ended_step": self._ended_step,
            "model": self.module.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "config": self.config,
            "classes": list(self.data.classes),
            "images": self.plan.images,
            "listing": self.listing,
            "batches": [self.plan.world_size, self.plan.micro_batch],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Everything that a step depends on; the schedule, the data and all draws follow from the step."""
        self._restore_weights(state)
        self.step, self.best, self._ended_step = state["step"], state["best"], state["ended_step"]

    def _restore_weights(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["model"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
        # The config's options, not the checkpoint's; but for lr, which the schedule sets with every step
        groups = self.optimizer.param_groups
        options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, configured in zip(self.optimizer.param_groups, options, strict=True):
            group.update(configured)

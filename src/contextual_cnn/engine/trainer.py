"""The training loop: steps of accumulated micro-batches, an evaluation and a checkpoint after each epoch."""

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

from contextual_cnn.contracts import Batch, StagedScores
from contextual_cnn.data import Augmentation, ImageData
from contextual_cnn.data.augmentation import BatchAugmentation
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import World
from contextual_cnn.engine.checkpoint import CheckpointStore
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.engine.loggers import MetricsLogger
from contextual_cnn.engine.progress import ProgressDisplay, describe_evaluation
from contextual_cnn.engine.train_meter import TrainMeter
from contextual_cnn.errors import UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.optim import step_if_finite
from contextual_cnn.randomness import Purpose, seed_all

if TYPE_CHECKING:
    from contextual_cnn.data.dali import EvaluationBatches

log = logging.getLogger(__name__)


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
    max_steps: ends the run early, without bending the schedule.
    max_skipped_steps: steps in a row that may be skipped for non-finite gradients before the run stops.
    timeout_minutes: how long a process waits for one that does not answer.
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
    max_steps: int | None = None
    max_skipped_steps: int = 10
    log_every: int = 50
    eval_every: int = 1
    timeout_minutes: float = 10

    def __post_init__(self) -> None:
        for key in ("log_every", "eval_every", "max_skipped_steps", "max_steps"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"trainer.{key} must be 1 or more, got {getattr(self, key)}", f"trainer.{key}=1")
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
        config: stored in the checkpoints, as plain containers.
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
        state: dict[str, Any] | None,
    ) -> None:
        self.settings, self.world, self.plan, self.seed = settings, world, plan, seed
        self.data, self.augmentation, self.store, self.config = data, augmentation, store, config
        self.module, self.loss, self.optimizer, self.schedule = model, loss, optimizer, schedule
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=settings.ema_warmup)
        whole = epochs * plan.steps_per_epoch
        self.last_step = min(whole, settings.max_steps or whole)
        self.step, self.best = 0, {"top1": -1.0, "epoch": 0, "weights": "raw"}
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

    def fit(self, logger: MetricsLogger, console: Console) -> None:
        """Trains to the last step."""
        batches = self.data.train_batches(self.plan, self.augmentation, self.seed, self.world, self.step)
        val_batches = self.data.evaluation_batches(self.world)
        self.module.train()
        self.meter.restart_clock()
        with ProgressDisplay(console, self.last_step, self.plan.steps_per_epoch, self.step) as progress:
            while not self.is_complete:
                self._train_step(batches)
                progress.advance(self.step)
                if self.step % self.settings.log_every == 0 or self.is_complete:
                    self._log_step(logger, progress)
                if self.step % self.plan.steps_per_epoch == 0 or self.is_complete:
                    self._end_epoch(val_batches, logger)

    @property
    def is_complete(self) -> bool:
        return self.step >= self.last_step

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.step // self.plan.steps_per_epoch

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: accumulate, guard, step, average."""
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for accumulated in range(self.plan.accumulation):
            with self.meter.waiting_for_data():
                batch = next(batches)
            # All that is drawn for this micro-batch hangs on its number, not on who computes it or what came before
            number = self.plan.micro_batch_number(self.step, accumulated, self.world.rank)
            seed_all(Purpose.MICRO_BATCH, self.seed, number)
            self._accumulate(self.augment(batch), last=accumulated == self.plan.accumulation - 1)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.grad_clip or float("inf"))
        finite = torch.isfinite(norm)  # of the reduced gradient, hence the same on all ranks
        step_if_finite(self.optimizer, finite)
        if self.ema is not None:
            self.ema.update(self.module, step=self.step + 1 if self.settings.ema_warmup else None)
        self.meter.add_step(norm, finite)
        self.meter.add_bad_images(self.data.bad_images.take_replaced())
        self.step += 1

    def _accumulate(self, batch: Batch, last: bool) -> None:
        """Forward and backward of one micro-batch; gradients cross the ranks with the last one only."""
        images = batch.images
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.model.no_sync() if self.world.size > 1 and not last else nullcontext():
            with self.settings.autocast(self.world.device):
                scores = StagedScores.of(self.model(images))
            loss = self.loss(scores, batch.targets)
            (loss.total / self.plan.accumulation).backward()
        self.meter.add_micro_batch(scores, loss, batch.targets)

    def _log_step(self, logger: MetricsLogger, progress: ProgressDisplay) -> None:
        """Reads and shows the metrics; the one place in the loop that waits for the device.

        Raises:
            UserError: the gradients have not been finite for too long.
        """
        measured, skipped_in_a_row = self.meter.read()
        measured["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        measured["epoch"] = self.step / self.plan.steps_per_epoch
        metrics = {f"train/{name}": value for name, value in measured.items()}
        logger.log(self.step, metrics)
        progress.report(self.step, metrics)
        if skipped_in_a_row >= self.settings.max_skipped_steps:
            raise UserError(
                f"the gradients were not finite for {skipped_in_a_row} steps up to step {self.step} "
                f"(loss {measured['loss']:.3g}, lr {measured['lr']:.3g}); those steps changed no weight",
                "try a smaller optimizer.lr, trainer.grad_clip=1.0 or trainer.precision=fp32, under a new run_name",
            )

    def _end_epoch(self, val_batches: "EvaluationBatches", logger: MetricsLogger) -> None:
        """Evaluates, logs and saves, as far as it is this epoch's turn."""
        is_best = False
        if self.is_complete or self.epoch % self.settings.eval_every == 0:
            metrics, is_best = self._evaluate(val_batches)
            logger.log(self.step, metrics)
        if self.world.is_main and (self.is_complete or is_best or self.epoch % self.store.every_epochs == 0):
            state = self._state()
            if is_best:
                self.store.save(state, self.store.best)
            self.store.save(state, self.store.last)
        self.meter.restart_clock()

    def _evaluate(self, val_batches: "EvaluationBatches") -> tuple[dict[str, float], bool]:
        models = {"raw": self.module} | ({"ema": self.ema.module} if self.ema is not None else {})
        if self.world.size > 1:
            for model in models.values():  # running statistics of batch norms differ from rank to rank
                distribute_bn(model, self.world.size, reduce=True)
        autocast = self.settings.autocast(self.world.device)
        reports = evaluate(models, val_batches, val_batches.images, self.world, autocast)
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
            "model": self.module.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "config": self.config,
            "classes": list(self.data.classes),
            "images": self.plan.images,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Everything that a step depends on; the schedule, the data and all draws follow from the step."""
        self.module.load_state_dict(state["model"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, configured in zip(self.optimizer.param_groups, options, strict=True):
            group.update(configured)  # load_state_dict would let the checkpoint's options override the config's
        self.step, self.best = state["step"], state["best"]

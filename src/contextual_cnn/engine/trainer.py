"""The training loop: steps of accumulated micro-batches, an evaluation and a checkpoint after each epoch."""

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contextual_cnn.contracts import Batch, StagedScores
from contextual_cnn.data import Augmentation, ImageData
from contextual_cnn.data.augmentation import BatchAugmentation
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import World
from contextual_cnn.engine.checkpoint import CheckpointStore
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.engine.loggers import MetricsLogger
from contextual_cnn.engine.metrics import Sums, labels_of, stage_hits, top_hits
from contextual_cnn.engine.progress import ProgressDisplay
from contextual_cnn.errors import UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.optim import step_if_finite
from contextual_cnn.randomness import seed_all

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
        for key in ("log_every", "eval_every", "max_skipped_steps"):
            if getattr(self, key) < 1:
                raise UserError(f"trainer.{key} must be 1 or more, got {getattr(self, key)}", f"trainer.{key}=1")
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
        self.total_steps = epochs * plan.steps_per_epoch
        self.last_step = min(self.total_steps, settings.max_steps or self.total_steps)
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
            )
        self.augment = BatchAugmentation(augmentation, data.num_classes, world.device)
        self.sums = Sums(world.device)
        self.skipped = torch.zeros((), device=world.device)  # steps in a row

    def fit(self, logger: MetricsLogger, console: Console) -> dict[str, float]:
        """Trains to the last step.

        Returns:
            The last evaluation's metrics.
        """
        batches = self.data.train_batches(self.plan, self.augmentation, self.seed, self.world, self.step)
        val_batches = self.data.evaluation_batches(self.world)
        metrics: dict[str, float] = {}
        self._started, self._first_step = time.perf_counter(), self.step
        self._since, self._waited = self._started, 0.0
        self.module.train()
        with ProgressDisplay(console, self.last_step, self.plan.steps_per_epoch, self.step) as progress:
            while self.step < self.last_step:
                self._train_step(batches)
                if self.step % self.settings.log_every == 0 or self.step == self.last_step:
                    train_metrics = self._read_metrics()
                    logger.log(self.step, train_metrics)
                    progress.report(self.step, train_metrics, time.perf_counter() - self._started)
                progress.advance(self.step)
                if self.step % self.plan.steps_per_epoch == 0 or self.step == self.last_step:
                    metrics = self._end_epoch(val_batches, logger) or metrics
        return metrics

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
            waiting = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - waiting
            # All that is drawn for this micro-batch hangs on its number, not on who computes it or what came before
            seed_all(self.seed, self.plan.micro_batch_number(self.step, accumulated, self.world.rank))
            self._accumulate(self.augment(batch), last=accumulated == self.plan.accumulation - 1)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.grad_clip or float("inf"))
        finite = torch.isfinite(norm)  # of the reduced gradient, hence the same on all ranks
        step_if_finite(self.optimizer, finite)
        if self.ema is not None:
            self.ema.update(self.module, step=self.step + 1 if self.settings.ema_warmup else None)
        self.skipped = (self.skipped + 1) * ~finite
        # The norm is the same on every rank: shared out, so that the sum over ranks is right
        self.sums.add(steps=1 / self.world.size, grad_norm=norm / self.world.size, skipped=~finite / self.world.size)
        self.step += 1

    def _accumulate(self, batch: Batch, last: bool) -> None:
        """Forward and backward of one micro-batch; gradients cross the ranks with the last one only."""
        silent = self.world.size > 1 and not last
        with self.model.no_sync() if silent else nullcontext():
            images = batch.images
            if self.settings.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with self.settings.autocast(self.world.device):
                scores = StagedScores.of(self.model(images))
            loss = self.loss(scores, batch.targets)
            (loss.total / self.plan.accumulation).backward()
        self._count(scores, loss.total.detach(), loss.parts, labels_of(batch.targets))

    def _count(self, scores: StagedScores, total: Tensor, parts: dict[str, Tensor], labels: Tensor) -> None:
        with torch.no_grad():
            self.sums.add(
                images=len(labels),
                loss=total * len(labels),
                **{name: value * len(labels) for name, value in parts.items()},
                **top_hits(scores.logits[-1], labels, ks=(1,)),
                **stage_hits(scores, labels),
            )

    def _read_metrics(self) -> dict[str, float]:
        """The metrics since the last read, over all ranks. The one place in the loop that waits for the device.

        Raises:
            UserError: the gradients have not been finite for too long.
        """
        skipped_in_a_row = int(self.skipped)
        sums = self.sums.read()
        images, steps = sums.pop("images"), sums.pop("steps")
        now = time.perf_counter()
        metrics = {
            "train/epoch": self.step / self.plan.steps_per_epoch,
            "train/lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train/grad_norm": sums.pop("grad_norm") / steps,
            "train/skipped_steps": sums.pop("skipped"),
            "train/images_per_second": images / (now - self._since),
            "train/data_wait": 100 * self._waited / (now - self._since),
        }
        self._since, self._waited = now, 0.0
        percent = ("top1", "recall")
        for name, value in sums.items():
            metrics[f"train/{name}"] = value / images * (100 if name.startswith(percent) else 1)
        if self.world.device.type == "cuda":
            metrics["train/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if skipped_in_a_row >= self.settings.max_skipped_steps:
            raise UserError(
                f"the gradients were not finite for {skipped_in_a_row} steps up to step {self.step} "
                f"(loss {metrics['train/loss']:.3g}, lr {metrics['train/lr']:.3g}); those steps changed no weight",
                "try a smaller optimizer.lr, trainer.grad_clip=1.0 or trainer.precision=fp32, under a new run_name",
            )
        return metrics

    def _end_epoch(self, val_batches, logger: MetricsLogger) -> dict[str, float]:
        """Evaluates, logs, saves. Returns the evaluation's metrics, or none if it was not this epoch's turn."""
        ending = self.step == self.last_step
        metrics, is_best = {}, False
        if ending or self.epoch % self.settings.eval_every == 0:
            metrics, is_best = self._evaluate(val_batches)
            logger.log(self.step, metrics)
        if self.world.is_main and (ending or is_best or self.epoch % self.store.every_epochs == 0):
            state = self._state()
            if is_best:
                self.store.save(state, self.store.best)
            self.store.save(state, self.store.last)
        self._since, self._waited = (
            time.perf_counter(),
            0.0,
        )  # the epoch's end is no part of the training speed
        return metrics

    def _evaluate(self, val_batches) -> tuple[dict[str, float], bool]:
        models = {"raw": self.module} | ({"ema": self.ema.module} if self.ema is not None else {})
        autocast = self.settings.autocast(self.world.device)
        reports = evaluate(models, val_batches, val_batches.images, self.world, autocast)
        weights = max(reports, key=lambda name: reports[name]["top1"])
        is_best = reports[weights]["top1"] > self.best["top1"]
        if is_best:
            self.best = {"top1": reports[weights]["top1"], "epoch": self.epoch, "weights": weights}
        summary = ", ".join(
            f"{name} top-1 {report['top1']:.2f} top-5 {report['top5']:.2f}" for name, report in reports.items()
        )
        recalls = [f"{value:.0f}" for name, value in reports["raw"].items() if name.startswith("recall")]
        log.info(
            "epoch %d evaluated: %s%s, %.0f img/s%s",
            -(-self.step // self.plan.steps_per_epoch),
            summary,
            f", recall {' '.join(recalls)} %" if recalls else "",
            reports["raw"]["images_per_second"],
            "  (best so far)" if is_best else "",
        )
        self._warn_of_collapse(reports["raw"])
        prefixes = {"raw": "val", "ema": "val_ema"}
        metrics = {
            f"{prefixes[name]}/{key}": value for name, report in reports.items() for key, value in report.items()
        }
        return metrics, is_best

    def _warn_of_collapse(self, report: dict[str, float]) -> None:
        """A staged loss can fall by losing targets; a shortlist no better than a random one shows it."""
        counts = getattr(self.module, "class_counts", ())
        for i, count in enumerate(counts, start=1):
            recall, chance = report[f"recall_stage{i}"], 100 * count / self.data.num_classes
            if recall < 1.1 * chance and chance < 90:
                log.warning(
                    "the shortlist after stage %d holds the true class in %.1f %% of the val images, "
                    "a random one in %.1f %%: stage %d has learned nothing yet",
                    *(i, recall, chance, i),
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
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], state["best"]

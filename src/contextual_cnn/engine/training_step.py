"""One optimizer step and the state that it changes: accumulated micro-batches, the guard, the step, the average."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contextual_cnn.contracts import Batch, StagedLoss, StagedScores
from contextual_cnn.data.mixing import BatchAugmentation
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import World
from contextual_cnn.engine.autocast import autocast
from contextual_cnn.engine.guarded_ema import GuardedEma
from contextual_cnn.engine.memory import out_of_memory
from contextual_cnn.engine.nonfinite import explain_nonfinite
from contextual_cnn.engine.train_meter import TrainMeter
from contextual_cnn.errors import UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.optim import clip_gradients, step_if_finite
from contextual_cnn.randomness import Purpose, seed_all
from contextual_cnn.settings.trainer import TrainerSettings


class TrainingStep:
    """Called with a step's number and this rank's micro-batches, it makes that step.

    Args:
        model: on the device, without DDP or compilation around it.
        state: what `state` gave once, or None.

    Attributes:
        module: the bare model; its parameters are those that are trained.
        ema: its average, or None.
        meter: what the steps measured.

    Raises:
        UserError: the state is another model's, or the micro-batches are too small for the model.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        model: nn.Module,
        loss: StagedCrossEntropy,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        augment: BatchAugmentation,
        plan: BatchPlan,
        seed: int,
        world: World,
        state: dict[str, Any] | None,
    ) -> None:
        self._settings, self._plan, self._seed, self._world = settings, plan, seed, world
        self.module, self._loss, self.optimizer, self.schedule = model, loss, optimizer, schedule
        self._augment_batch = augment
        if plan.micro_batch == 1 and any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
            raise UserError(
                "the model's projections have batch norms, which cannot learn from micro-batches of one image",
                "trainer.micro_batch_size=2 or more, or model.projection_norm=layer",
            )
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = GuardedEma(model, decay=settings.ema_decay, use_warmup=settings.ema_warmup)
        if state is not None:
            self.restore(state)
        # Wrapped last: the EMA copy and the checkpoints see the bare module, whose names have no prefix
        self._model = torch.compile(model) if settings.compile else model
        if world.size > 1:
            self._model = DistributedDataParallel(
                self._model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                static_graph=plan.accumulation == 1,  # with no_sync in the first step it fails inside torch
            )
        self.meter = TrainMeter(world)

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """Accumulate, guard, step, average.

        Args:
            step: counted from 0.

        Raises:
            UserError: the GPU's memory does not suffice.
        """
        try:
            self._step(step, batches)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self._world, self._plan, step) from error

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        self.schedule.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        statistics = [(buffer, buffer.clone()) for buffer in self.module.buffers()]  # of batch norms
        for accumulated in range(self._plan.accumulation):
            with self.meter.waiting_for_data():
                batch = next(batches)
            self.meter.add_bad_images(batch.replaced)
            batch = self._augment(batch, step, accumulated)
            self._accumulate(batch, last=accumulated == self._plan.accumulation - 1)
        norm = clip_gradients(self.module, self._settings.grad_clip, self._settings.grad_clip_mode)
        finite = torch.isfinite(norm)  # of the reduced gradient, hence the same on all ranks
        if self._settings.on_nonfinite == "stop":
            finite = finite & (self.meter.skipped_in_a_row == 0)  # the first one to be skipped is the last one
        step_if_finite(self.optimizer, finite)
        for buffer, before in statistics:  # the forward passes have changed them already
            buffer.copy_(torch.where(finite, buffer, before))
        if self.ema is not None:
            self.ema.update_if(finite, self.module, step=step + 1 if self._settings.ema_warmup else None)
        self.meter.add_step(norm, finite)

    @property
    def lr(self) -> float:
        """Of the step that was made last."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def state(self) -> dict[str, Any]:
        """All that a step changes; the live tensors, not a copy."""
        return {
            "model": self.module.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "optimized": self._optimized(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; other keys are passed over.

        Raises:
            UserError: it is the state of another model, or of one whose parameters came in another order.
        """
        # Moments are stored by position; checkpoints of before November 2026 do not name their parameters
        if state.get("optimized", self._optimized()) != self._optimized():
            raise UserError(
                "the checkpoint's optimizer has other parameters, or in another order, than the model",
                "continue with the code that wrote it, or run_name=NEW_NAME",
            )
        try:
            self.module.load_state_dict(state["model"])
            if self.ema is not None and state["ema"] is not None:
                self.ema.module.load_state_dict(state["ema"])
        except RuntimeError as error:
            differences = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise UserError(f"the checkpoint is of another model: {differences:.600}", "run_name=NEW_NAME") from error
        # The config's options, not the checkpoint's; but for lr, which the schedule sets with every step
        groups = self.optimizer.param_groups
        options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        _give_strides_of_parameters(self.optimizer)
        for group, configured in zip(self.optimizer.param_groups, options, strict=True):
            group.update(configured)

    def _optimized(self) -> list[list[str]]:
        """The parameters' names, by the optimizer's groups and in its order."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        return [[names[parameter] for parameter in group["params"]] for group in self.optimizer.param_groups]

    def nonfinite_error(self, step: int, batches: Iterator[Batch], skipped: int, folder: Path) -> UserError:
        """What the first of the skipped steps looks like: computed again, which gives the same draws and weights.

        Args:
            step: counted from 0.
            batches: from that step on.
            folder: gets a micro-batch.
        """
        self.schedule.step_update(step)
        prepared = (self._augment(next(batches), step, i) for i in range(self._plan.accumulation))

        def loss_of(batch: Batch) -> StagedLoss:
            return self._forward(self.module, batch)[1]

        found = explain_nonfinite(
            ((batch, partial(loss_of, batch)) for batch in prepared),
            folder=folder,
            step=step,
            lr=self.lr,
            world=self._world,
        )
        return UserError(
            f"loss or gradients were not finite for {skipped} steps from step {step + 1} on ({found}); "
            "they changed no weight",
            "try a smaller optimizer.lr, trainer.grad_clip=1.0, trainer.precision=fp32 or "
            "trainer.on_nonfinite=rollback, under a new run_name",
        )

    def _augment(self, batch: Batch, step: int, accumulated: int) -> Batch:
        """All that is drawn for a micro-batch hangs on its number, not on who computes it or what came before."""
        seed_all(Purpose.MICRO_BATCH, self._seed, self._plan.micro_batch_number(step, accumulated, self._world.rank))
        return self._augment_batch(batch)

    def _forward(self, model: Callable[..., Any], batch: Batch) -> tuple[StagedScores, StagedLoss]:
        images = batch.images
        if self._settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self._settings.precision, self._world.device):
            scores = StagedScores.of(model(images))
        return scores, self._loss(scores, batch.targets)

    def _accumulate(self, batch: Batch, last: bool) -> None:
        """Forward and backward of one micro-batch; gradients cross the ranks with the last one only."""
        with self._model.no_sync() if isinstance(self._model, DistributedDataParallel) and not last else nullcontext():
            scores, loss = self._forward(self._model, batch)
            # An infinite loss may have finite gradients: made NaN, they reach all ranks, which skip the step alike
            is_finite = torch.isfinite(loss.total.detach())
            loss.total.backward(torch.where(is_finite, 1 / self._plan.accumulation, torch.nan))
        self.meter.add_micro_batch(scores, loss, batch.targets)


def _give_strides_of_parameters(optimizer: torch.optim.Optimizer) -> None:
    """The moments of a checkpoint have the strides of the run that wrote it, perhaps of another memory format.

    torch keeps them, and its fused kernels walk through parameters and moments side by side in memory.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

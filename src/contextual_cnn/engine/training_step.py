"""One optimizer step and the state that it changes: accumulated micro-batches, the guard, the step, the average."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from contextual_cnn.batch_plan import NormPlan
from contextual_cnn.engine.batch_norms import BatchNorms
from contextual_cnn.engine.drop_paths import DropPaths
from contextual_cnn.engine.guarded_ema import GuardedEma
from contextual_cnn.engine.precision import autocast, under
from contextual_cnn.engine.train_meter import TrainMeter
from contextual_cnn.errors import UserError
from contextual_cnn.guards.memory import explained_shortage
from contextual_cnn.guards.nonfinite import explain_nonfinite
from contextual_cnn.optim import clip_gradients, may_step
from contextual_cnn.randomness import DRAWS, Places, Purpose, seed_all
from contextual_cnn.settings.trainer import TrainerSettings
from contextual_cnn.task import Batch, Call, Outcome, Position, Task


class TrainingStep:
    """Called with a step's number and this rank's micro-batches, it makes that step.

    Args:
        model: on the device, without DDP or compilation around it.
        position: the batches' plan, the seed and this process; its step means nothing here.
        state: what `state` gave once, or None.

    Attributes:
        module: the bare model; its parameters are those that are trained.
        ema: its average, or None.
        meter: what the steps measured.

    Raises:
        UserError: the state is another model's, or the batches do not fit the model.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        position: Position,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._settings, self._task, self.position = settings, task, position
        self.module, self.optimizer, self.schedule = model, optimizer, schedule
        task.check_model(model, settings, position.plan)
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = GuardedEma(model, decay=settings.ema_decay, use_warmup=settings.ema_warmup)
        if state is not None:
            self.restore(state)
        # Wrapped last: the EMA copy and the checkpoints see the bare module, whose names have no prefix
        world = position.world
        self._draws = DRAWS if state is None else state.get("draws", 1)
        self._normed_before = state and state.get("norm_images")
        self._drop_paths = DropPaths(model, position.plan.micro_batch, world.device) if self._draws > 1 else None
        self.norms = BatchNorms(model, position.plan, self._norm_plan(), world.patience)
        managed = set(map(id, self.norms.managed))
        self._buffers = [buffer for buffer in model.buffers() if id(buffer) not in managed]
        self._compiled: dict[str, Any] = {}  # for evaluations, which compile when the first one comes
        self._compiles = settings.compiles_on(world.device.type)
        self._model = torch.compile(model, mode=settings.compile_mode) if self._compiles else model
        if world.size > 1:
            distributed = DistributedDataParallel(
                self._model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                forward_sync_buffers=bool(self._buffers),
                static_graph=position.plan.accumulation == 1,  # with no_sync in the first step it fails inside torch
            )
            if settings.compress_gradients:
                distributed.register_comm_hook(None, bf16_compress_hook)
            self._model = distributed
        self.meter = TrainMeter(world)

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """Accumulate, guard, step, average.

        Args:
            step: counted from 0.

        Raises:
            UserError: the GPU's memory does not suffice.
        """
        plan, settings = self.position.plan, self._settings
        with explained_shortage(self.position.world, plan, step):
            self.schedule.step_update(step)
            self.optimizer.zero_grad(set_to_none=True)
            buffers = [(buffer, buffer.clone()) for buffer in self._buffers]  # whatever a model keeps in them
            for accumulated in range(plan.accumulation):
                with self.meter.waiting_for_data():
                    batch = next(batches)
                self._accumulate(self._prepare(batch, step, accumulated), last=accumulated == plan.accumulation - 1)
            norm = clip_gradients(self.module, settings.grad_clip, settings.grad_clip_mode)
            finite = torch.isfinite(norm)  # of the reduced gradient, hence the same on all ranks
            if settings.on_nonfinite == "stop":
                finite = finite & (self.meter.skipped_in_a_row == 0)  # the first one to be skipped is the last one
            if may_step(self.optimizer, finite):
                self.optimizer.step()
            self.norms.settle(finite)
            for buffer, before in buffers:  # the forward passes have changed them already
                buffer.copy_(torch.where(finite, buffer, before))
            if self.ema is not None:
                self.ema.update_if(finite, self.module, step=step + 1 if settings.ema_warmup else None)
            self.meter.add_step(norm, finite)

    @property
    def lr(self) -> float:
        """Of the step that was made last, before the factors of single groups."""
        return max(group["lr"] / group.get("lr_scale", 1.0) for group in self.optimizer.param_groups)

    def evaluated(self) -> dict[str, nn.Module]:
        """The models that an evaluation is of, by the names of their weights."""
        return {"raw": self.module} | ({"ema": self.ema.module} if self.ema is not None else {})

    def evaluated_calls(self) -> dict[str, Call]:
        """The same as they are called, compiled where the training is."""
        if self._compiles and not self._compiled:
            mode = self._settings.compile_mode
            self._compiled = {name: torch.compile(model, mode=mode) for name, model in self.evaluated().items()}
        context = autocast(self._settings.precision, self.position.world.device)
        return {name: under(context, self._compiled.get(name, model)) for name, model in self.evaluated().items()}

    def agree_on_buffers(self) -> None:
        """Those of rank 0 count, of what running statistics a model has beside those of its batch norms; called by all
        ranks before an evaluation, so that a run that goes on from a checkpoint ends with the same bits.
        """
        if self._buffers and self.position.world.size > 1:
            for model in self.evaluated().values():
                distribute_bn(model, self.position.world.size, reduce=False)

    def state(self) -> dict[str, Any]:
        """All that a step changes; the live tensors, not a copy."""
        return {
            "model": self.module.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "optimized": self._optimized(),
            "draws": self._draws,
            "norm_images": self.norms.images,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; other keys are passed over.

        Raises:
            UserError: it is the state of another model, or of one whose parameters came in another order.
        """
        if state.get("draws", 1) > DRAWS:
            raise UserError("the checkpoint draws as a later version of this program does", "update contextual-cnn")
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
        prepared = (self._prepare(next(batches), step, i) for i in range(self.position.plan.accumulation))
        found = explain_nonfinite(
            ((self._task.evidence(batch), self._forward(self.module, batch)) for batch in prepared),
            folder=folder,
            step=step,
            lr=self.lr,
            world=self.position.world,
        )
        return UserError(
            f"loss or gradients were not finite for {skipped} steps from step {step + 1} on ({found}); "
            "they changed no weight",
            "try a smaller optimizer.lr, trainer.grad_clip=1.0, trainer.precision=fp32 or "
            "trainer.on_nonfinite=rollback, under a new run_name",
        )

    def _prepare(self, batch: Batch, step: int, accumulated: int) -> Batch:
        """What is drawn for a micro-batch depends on its places, not on who computes it or what came before."""
        plan, rank, seed = self.position.plan, self.position.world.rank, self.position.seed
        seed_all(Purpose.MICRO_BATCH, seed, plan.micro_batch_number(step, accumulated, rank))
        if self._drop_paths is None:
            return self._task.prepare(batch, None)
        places = Places(seed, step, plan.first_place(accumulated, rank), plan.micro_batch)
        self._drop_paths.draw(places)
        return self._task.prepare(batch, places)

    def remark_on_norms(self) -> str | None:
        """What is to be said where batch norms see another number of images than they should, or than they did."""
        plan, images = self.position.plan, self.norms.images
        wanted = min(self._task.norm_images(self._settings, plan), plan.global_batch)
        wanted = self._normed_before or wanted
        if not len(self.norms) or images == wanted or self._draws == 1:
            return None
        return (
            f"the batch norms see {images} images at a time instead of {wanted}, and accumulated micro-batches cannot "
            f"be joined: trainer.micro_batch_size={wanted}, or as many processes as make that up"
        )

    def _norm_plan(self) -> NormPlan:
        """Of runs of DRAWS 1: each micro-batch by itself."""
        plan = self.position.plan
        if self._draws == 1:
            return NormPlan(plan.micro_batch)
        return NormPlan.make(plan, self._task.norm_images(self._settings, plan))

    def _forward(self, model: Call, batch: Batch) -> Outcome:
        context = autocast(self._settings.precision, self.position.world.device)
        return self._task.forward(under(context, model, self._settings.channels_last), batch)

    def _accumulate(self, batch: Batch, last: bool) -> None:
        """Forward and backward of one micro-batch; gradients cross the ranks with the last one only."""
        with self._model.no_sync() if isinstance(self._model, DistributedDataParallel) and not last else nullcontext():
            outcome = self._forward(self._model, batch)
            # An infinite loss may have finite gradients: made NaN, they reach all ranks, which skip the step alike
            is_finite = torch.isfinite(outcome.loss.detach())
            outcome.loss.backward(torch.where(is_finite, 1 / self.position.plan.accumulation, torch.nan))
        self.meter.add_micro_batch(outcome, batch)


def _give_strides_of_parameters(optimizer: torch.optim.Optimizer) -> None:
    """The moments of a checkpoint have the strides of the run that wrote it, perhaps of another memory format.

    torch keeps them, and its fused kernels walk through parameters and moments side by side in memory.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

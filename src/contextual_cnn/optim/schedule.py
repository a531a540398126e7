"""The learning rate as a function of the step alone, so that resuming needs nothing saved."""

import math
from typing import Literal

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from contextual_cnn.errors import UserError


def build_schedule(
    optimizer: Optimizer,
    steps_per_epoch: int,
    *,
    name: Literal["cosine", "tanh", "poly", "wsd", "step", "constant"] = "cosine",
    epochs: int = 300,
    warmup_epochs: int = 20,
    warmup_lr: float = 0.0,
    min_lr: float = 1e-6,
    decay_epochs: float | None = None,
    decay_rate: float = 0.1,
) -> Scheduler:
    """ConvNeXt's schedule from timm's parts: linear warm-up, then cosine over the epochs that remain, per step.

    Args:
        name: timm's other shapes take the place of the cosine. "plateau" is not among them: it hangs on what has been
            measured, not on the step.
        epochs: in all, the warm-up included.
        decay_epochs: "step" multiplies by decay_rate every so many epochs after the warm-up (None: 90), "wsd" falls
            over the last so many (None: a fifth). The other shapes pass over it.
        decay_rate: of "step"; of "poly" the power, 1 is linear.

    Returns:
        A scheduler to be called as `step_update(step)` before the optimizer's step.

    Raises:
        UserError: a number out of range.
    """
    for key, rate in dict(warmup_lr=warmup_lr, min_lr=min_lr).items():
        if not 0 <= rate < math.inf:
            raise UserError(f"schedule.{key} must be 0 or more, got {rate}", f"schedule.{key}=0")
    if not 0 < decay_rate < math.inf:
        raise UserError(f"schedule.decay_rate must be above 0, got {decay_rate}", "schedule.decay_rate=0.1")
    if not 0 <= warmup_epochs < epochs:
        raise UserError(
            f"schedule.warmup_epochs={warmup_epochs} leaves nothing of schedule.epochs={epochs}",
            # The recipe's share, 20 of 300; without a warm-up its learning rate diverges
            f"schedule.warmup_epochs={max(1, round(epochs / 15))}" if epochs > 1 else "schedule.epochs=300",
        )
    if decay_epochs is not None and not 0 < decay_epochs <= epochs - warmup_epochs:
        raise UserError(
            f"schedule.decay_epochs={decay_epochs} does not fit the {epochs - warmup_epochs} epochs after the warm-up",
            "schedule.decay_epochs=null",
        )
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=name,
        num_epochs=epochs - warmup_epochs,
        warmup_epochs=warmup_epochs,
        warmup_prefix=True,  # the cosine starts at its top when the warm-up ends (ConvNeXt), not part of the way down
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        decay_epochs=decay_epochs,
        decay_rate=decay_rate,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule

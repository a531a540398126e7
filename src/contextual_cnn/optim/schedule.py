"""The learning rate as a function of the step alone, so that resuming needs nothing saved."""

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from contextual_cnn.errors import UserError


def build_schedule(
    optimizer: Optimizer,
    steps_per_epoch: int,
    *,
    name: str = "cosine",
    epochs: int = 300,
    warmup_epochs: int = 20,
    warmup_lr: float = 0.0,
    min_lr: float = 1e-6,
) -> Scheduler:
    """ConvNeXt's schedule from timm's parts: linear warm-up, then cosine over the epochs that remain, per step.

    Args:
        epochs: in all, the warm-up included.

    Returns:
        A scheduler to be called as `step_update(step)` before the optimizer's step.
    """
    if not 0 <= warmup_epochs < epochs:
        raise UserError(
            f"schedule.warmup_epochs={warmup_epochs} leaves nothing of schedule.epochs={epochs}",
            f"schedule.warmup_epochs={max(0, epochs // 15)}",
        )
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=name,
        num_epochs=epochs - warmup_epochs,
        warmup_epochs=warmup_epochs,
        warmup_prefix=True,  # the cosine starts at its top when the warm-up ends (ConvNeXt), not part of the way down
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule

"""The learning rate as a function of the step alone, so that resuming needs nothing saved."""

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from contextual_cnn.settings.schedule import ScheduleSettings


def build_schedule(optimizer: Optimizer, settings: ScheduleSettings, steps_per_epoch: int) -> Scheduler:
    """ConvNeXt's schedule from timm's parts: linear warm-up, then cosine over the epochs that remain, per step.

    timm's other shapes take the place of the cosine.

    Returns:
        A scheduler to be called as `step_update(step)` before the optimizer's step.
    """
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=settings.name,
        num_epochs=settings.epochs - settings.warmup_epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_prefix=True,  # the cosine starts at its top when the warm-up ends (ConvNeXt), not part of the way down
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        decay_epochs=settings.decay_epochs,
        decay_rate=settings.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule

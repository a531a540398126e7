"""The learning rate as a function of the step alone, so that resuming needs nothing saved."""

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from contextual_cnn.settings.schedule import ScheduleSettings


def build_schedule(optimizer: Optimizer, settings: ScheduleSettings, steps_per_epoch: int) -> Scheduler:
    """ConvNeXt's schedule from timm's parts: linear warm-up, then cosine over the epochs that remain, per step.

    timm's other shapes take the place of the cosine. Milestones count from the start of the run, as in TSM and
    mmdetection, not from the end of the warm-up.

    Returns:
        A scheduler to be called as `step_update(step)` before the optimizer's step.
    """
    warmup_epochs: float = settings.warmup_epochs
    if settings.warmup_steps is not None:
        warmup_epochs = settings.warmup_steps / steps_per_epoch
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=settings.name,
        num_epochs=settings.epochs - warmup_epochs,  # type: ignore[arg-type] # a share of an epoch is fine
        warmup_epochs=warmup_epochs,  # type: ignore[arg-type]
        # The cosine starts at its top when the warm-up ends (ConvNeXt), not part of the way down
        warmup_prefix=settings.name != "multistep",
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        decay_epochs=settings.decay_epochs,
        # timm compares a milestone with the step that follows: half a step more, and it counts from its epoch's first
        decay_milestones=[epoch + 0.5 / steps_per_epoch for epoch in settings.milestones or ()],  # type: ignore[misc]
        decay_rate=settings.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule

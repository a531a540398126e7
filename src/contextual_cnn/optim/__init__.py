"""The optimizer and the learning-rate schedule, thin over timm's factories."""

from contextual_cnn.optim.optimizer import build_optimizer, step_if_finite
from contextual_cnn.optim.schedule import build_schedule

__all__ = ["build_optimizer", "build_schedule", "step_if_finite"]

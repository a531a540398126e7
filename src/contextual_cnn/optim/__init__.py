"""Optimizer, learning-rate schedule and clipping, thin over timm's."""

from contextual_cnn.optim.clipping import clip_gradients
from contextual_cnn.optim.optimizer import build_optimizer, may_step
from contextual_cnn.optim.schedule import build_schedule

__all__ = ["build_optimizer", "build_schedule", "clip_gradients", "may_step"]

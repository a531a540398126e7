"""Architectures, registered with timm when this package is imported."""

from contextual_cnn.models import convnext, resnet  # noqa: F401 - registers them
from contextual_cnn.models.build import build_model, summarize
from contextual_cnn.models.contextual_model import ContextualModel

__all__ = ["ContextualModel", "build_model", "summarize"]

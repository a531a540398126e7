"""Architectures, registered with timm when this package is imported."""

from contextual_cnn.models.build import build_model, describe
from contextual_cnn.models.convnext import ContextualConvNeXt

__all__ = ["ContextualConvNeXt", "build_model", "describe"]

"""Pure functions; no parameters, no modules."""

from contextual_cnn.ops.contextual_conv import contextual_conv2d

__all__ = ["contextual_conv2d"]

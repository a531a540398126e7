"""Pure functions; no parameters, no modules."""

from contextual_cnn.ops.contextual_convolution import contextual_conv2d
from contextual_cnn.ops.depthwise_conv import depthwise_conv2d

__all__ = ["contextual_conv2d", "depthwise_conv2d"]

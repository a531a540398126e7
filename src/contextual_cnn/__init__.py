"""Contextual Convolutional Networks (ICLR 2023): models, data path and training loop."""

__version__ = "0.1.0"

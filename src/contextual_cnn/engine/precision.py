"""The precision of a forward pass."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from contextual_cnn.settings.trainer import Precision
from contextual_cnn.task import Call


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The autocast context of a precision on a device; "auto" is bfloat16 on a GPU, float32 on a CPU.

    It may be entered again and again.
    """
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def under(context: AbstractContextManager, model: Call, channels_last: bool = False) -> Call:
    """The model, called in a context.

    Args:
        channels_last: the memory format of what it is given, as far as that has four dimensions.
    """

    def call(*inputs: Any, **options: Any) -> Any:
        if channels_last:
            inputs = tuple(map(_channels_last, inputs))
        with context:
            return model(*inputs, **options)

    return call


def _channels_last(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value

"""The precision of a forward pass."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from contextual_cnn.device import has_bf16
from contextual_cnn.errors import UserError
from contextual_cnn.settings.trainer import Precision
from contextual_cnn.task import Call


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The autocast context of a precision on a device; "auto" is bfloat16 on a GPU, float32 on a CPU.

    It may be entered again and again.

    Raises:
        UserError: the GPU has no bfloat16.
    """
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    if bf16 and not has_bf16(device):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16, and would emulate it slowly",
            "trainer.precision=fp32 (of evaluate.py: precision=fp32)",
        )
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

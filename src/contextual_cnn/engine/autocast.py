"""The precision of a forward pass."""

import torch

from contextual_cnn.settings.trainer import Precision


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The autocast context of a precision on a device; "auto" is bfloat16 on a GPU, float32 on a CPU."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

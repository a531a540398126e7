"""From the host's memory to a device without waiting for it, so that the host goes ahead with the next operations."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The values on the device.

    A GPU copies by itself only from pinned memory: from any other, `to` waits until all work before the copy is done.
    PyTorch keeps a pinned block from being used again before its copy is made.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

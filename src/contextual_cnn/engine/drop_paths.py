"""Dropped paths (Deep Networks with Stochastic Depth, Huang et al., 2016) that are drawn for a place of the batch."""

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from contextual_cnn.data.transfer import to_device
from contextual_cnn.randomness import Places, Purpose


class DropPaths:
    """The dropped paths of a model, which from now on drop what `draw` has said.

    Args:
        model: on its device; its DropPath modules are replaced.
        samples: of a micro-batch.
    """

    def __init__(self, model: nn.Module, samples: int, device: torch.device) -> None:
        found = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, DropPath) and child.drop_prob
        ]
        self._keep = np.array([1 - child.drop_prob for _, _, child in found])
        scales = np.array([child.scale_by_keep and child.drop_prob < 1 for _, _, child in found], dtype=bool)
        self._kept = np.where(scales, 1 / np.where(scales, self._keep, 1), 1.0)
        self._factors = torch.ones(len(found), samples, device=device)
        for factors, (parent, name, _) in zip(self._factors, found, strict=True):
            setattr(parent, name, _DrawnDropPath(factors))

    def draw(self, places: Places) -> None:
        """What is dropped in the forward passes from now on."""
        if len(self._keep):
            columns = -(-len(self._keep) // 4) * 4
            drawn = places.uniform(Purpose.DROP_PATH, columns)[:, : len(self._keep)]
            factors = np.where(drawn < self._keep, self._kept, 0.0).T.astype(np.float32)
            self._factors.copy_(to_device(factors, self._factors.device))


class _DrawnDropPath(nn.Module):
    """factors: (B,), by what each sample's path is multiplied. No buffer, which would travel with the model.

    The rows of one sample, such as the frames of a clip, share its factor.
    """

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) or (B T, ...) -> the same shape."""
        if not self.training:
            return x
        factors = self.factors.to(x.dtype)
        if len(x) != len(factors):
            factors = factors.repeat_interleave(len(x) // len(factors))
        return x * factors.view(-1, *[1] * (x.ndim - 1))

"""The average of the weights, behind the guard against non-finite gradients."""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class GuardedEma(ModelEmaV3):
    """timm's average of a model's floating-point state, with an update that a skipped step leaves out."""

    @torch.no_grad()
    def update_if(self, finite: Tensor, model: nn.Module, step: int | None = None) -> None:
        """As `update`, or nothing at all if `finite` is False. The host does not wait for the device.

        Args:
            finite: bool scalar on the model's device.
            step: counted from 1, for the warm-up of the decay; None is without.
        """
        weight = finite * (1.0 - self.get_decay(step))
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight.to(average.dtype))
            else:  # a counter, which a skipped step has put back already
                average.copy_(value)

"""The keys of conf/optimizer/: one of timm's optimizers and its numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from contextual_cnn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """name: of an optimizer that timm has (paper: AdamW).

    lr: peak learning rate, as it is, unless lr_scaling says otherwise.
    lr_scaling, lr_base_size: lr belongs to a batch of lr_base_size images, and grows in proportion to the global
        batch, or to its square root.
    bias_lr, classifier_lr: by what the learning rate of biases (of convolutions and linear layers, not of norms) and of
        the classifier is multiplied; of the classifier's bias by both. None is 1.
    generator_lr: the same for the layers that make offsets of a contextual convolution. They begin with zeros at the
        end, so that the layers in front of it learn nothing at first.
    layer_decay: of a ConvNeXt, the factor from each of its layers to the one before (see `optim.layer_decay`).
    betas, eps, momentum: None leaves the optimizer's own; set those to null that an optimizer does not have.
    """

    name: str = "adamw"
    lr: float = 1e-3
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    lr_base_size: int = 4096
    weight_decay: float = 0.05
    betas: Sequence[float] | None = (0.9, 0.999)
    eps: float | None = 1e-8
    momentum: float | None = None
    bias_lr: float | None = None
    classifier_lr: float | None = None
    generator_lr: float | None = None
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UserError(f"optimizer.lr must be above 0 and finite, got {self.lr}", "optimizer.lr=1e-3")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(
                f"optimizer.weight_decay must be 0 or more, got {self.weight_decay}", "optimizer.weight_decay=0.05"
            )
        if self.lr_base_size < 1:
            raise UserError(
                f"optimizer.lr_base_size must be 1 or more, got {self.lr_base_size}", "optimizer.lr_base_size=4096"
            )
        if self.eps is not None and not 0 <= self.eps < math.inf:
            raise UserError(f"optimizer.eps must be 0 or more, got {self.eps}", "optimizer.eps=1e-8")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise UserError(
                f"optimizer.momentum must be from 0 to below 1, got {self.momentum}", "optimizer.momentum=0.9"
            )

        for key in ("bias_lr", "classifier_lr", "generator_lr"):
            factor = getattr(self, key)
            if factor is not None and not 0 < factor < math.inf:
                raise UserError(f"optimizer.{key} must be above 0 and finite, got {factor}", f"optimizer.{key}=null")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(
                f"optimizer.layer_decay must be above 0 and at most 1, got {self.layer_decay}",
                "optimizer.layer_decay=null",
            )

    def lr_at(self, global_batch: int) -> float:
        """The peak learning rate for so many images a step."""
        return self.lr * (global_batch / self.lr_base_size) ** {"none": 0, "linear": 1, "sqrt": 0.5}[self.lr_scaling]

    @property
    def own_options(self) -> dict[str, Sequence[float] | float]:
        """Of betas, eps and momentum those that are set."""
        return {key: value for key in ("betas", "eps", "momentum") if (value := getattr(self, key)) is not None}

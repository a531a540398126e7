"""The keys of conf/loss/: the staged loss (section 3.1, equations 1 and 2)."""

from dataclasses import dataclass
from typing import Literal

from contextual_cnn.errors import UserError

Reduction = Literal["considered", "batch"]


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """alpha: weight of all stages but the last (paper: 0.15).

    reduction: what the paper leaves open. "considered": the mean over the samples whose target is considered (released
        code), each counted by the share of its target that is. "batch": the mean over the batch, equation 1 read
        literally. They differ only where classes have been dropped.
    """

    alpha: float = 0.15
    reduction: Reduction = "considered"

    def __post_init__(self) -> None:
        if not self.alpha >= 0:  # a NaN neither
            raise UserError(
                f"loss.alpha must not be negative, got {self.alpha}", "the paper's value is loss.alpha=0.15"
            )

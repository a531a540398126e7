"""The keys of conf/schedule/: the learning rate over the epochs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from contextual_cnn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """name: the shape after a linear warm-up (paper: cosine). "plateau" is not among timm's shapes here: it depends on
        what has been measured, not on the step.
    epochs: in all, the warm-up included.
    warmup_epochs, warmup_steps: the length of the warm-up, in one or the other.
    warmup_lr, min_lr: where the warm-up starts, and where the shape ends.
    decay_epochs: "step" multiplies by decay_rate every so many epochs after the warm-up (None: 90), "wsd" falls
        over the last so many (None: a fifth). The other shapes ignore it.
    milestones: "multistep" multiplies by decay_rate after each of these epochs, counted from the start of the run.
    decay_rate: of "step" and "multistep"; of "poly" the power, 1 is linear.
    """

    name: Literal["cosine", "tanh", "poly", "wsd", "step", "multistep", "constant"] = "cosine"
    epochs: int = 300
    warmup_epochs: int = 20
    warmup_steps: int | None = None
    warmup_lr: float = 0.0
    min_lr: float = 1e-6
    decay_epochs: float | None = None
    milestones: Sequence[int] | None = None
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        for key in ("warmup_lr", "min_lr"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"schedule.{key} must be 0 or more, got {getattr(self, key)}", f"schedule.{key}=0")
        if not 0 < self.decay_rate < math.inf:
            raise UserError(f"schedule.decay_rate must be above 0, got {self.decay_rate}", "schedule.decay_rate=0.1")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f"schedule.warmup_epochs={self.warmup_epochs} leaves nothing of schedule.epochs={self.epochs}",
                # The recipe's share, 20 of 300; without a warm-up its learning rate diverges
                f"schedule.warmup_epochs={max(1, round(self.epochs / 15))}"
                if self.epochs > 1
                else "schedule.epochs=300",
            )
        after_warmup = self.epochs - self.warmup_epochs
        if self.decay_epochs is not None and not 0 < self.decay_epochs <= after_warmup:
            raise UserError(
                f"schedule.decay_epochs={self.decay_epochs} does not fit the {after_warmup} epochs after the warm-up",
                "schedule.decay_epochs=null",
            )
        if self.warmup_steps is not None and (self.warmup_steps < 0 or self.warmup_epochs):
            raise UserError(
                f"schedule.warmup_steps={self.warmup_steps} beside schedule.warmup_epochs={self.warmup_epochs}: "
                "a warm-up has one length, of 0 or more",
                "schedule.warmup_epochs=0, or schedule.warmup_steps=null",
            )
        self._check_milestones()

    @property
    def warmup(self) -> str:
        """Its length as a person reads it."""
        return str(self.warmup_epochs) if self.warmup_steps is None else f"{self.warmup_steps} steps"

    def _check_milestones(self) -> None:
        stages = self.milestones or []
        if (self.name == "multistep") != bool(stages):
            raise UserError(
                f"schedule.name={self.name} with schedule.milestones={self.milestones}: they belong together",
                f"schedule.milestones=[{max(1, self.epochs * 2 // 3)}]" if not stages else "schedule.milestones=null",
            )
        if sorted(set(stages) & set(range(1, self.epochs))) != list(stages):
            raise UserError(
                f"schedule.milestones={list(stages)} are not epochs of {self.epochs}, in ascending order",
                "schedule.milestones=[20,40] of 50 epochs, for example",
            )

"""The keys of conf/checkpoint/: how often a run is saved."""

from dataclasses import dataclass, fields

from contextual_cnn.errors import UserError
from contextual_cnn.settings.keys import may_change


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """every_epochs: how often `last.pt` is written; always after the last epoch too. Left out where the one before is
        still being written, or where copying the state would take more than 1 % of the time since then.

    every_steps, every_minutes: and inside an epoch; None leaves that out. Looked at when metrics are logged.
    """

    every_epochs: int = may_change(1)
    every_steps: int | None = may_change(None)
    every_minutes: float | None = may_change(10)

    def __post_init__(self) -> None:
        for key in (field.name for field in fields(self)):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise UserError(f"checkpoint.{key} must be above 0, got {value}", f"checkpoint.{key}=1")

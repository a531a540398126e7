"""The settings that every training run has, whatever its task: the keys of conf/train.yaml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contextual_cnn.errors import UserError
from contextual_cnn.settings.checkpoint import CheckpointSettings
from contextual_cnn.settings.keys import may_change
from contextual_cnn.settings.logger import LoggerSettings
from contextual_cnn.settings.optimizer import OptimizerSettings
from contextual_cnn.settings.schedule import ScheduleSettings
from contextual_cnn.settings.trainer import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """run_name: the run's folder below output_dir; the same name resumes.

    seed: every random number of the run depends on it.
    resume: "auto" refuses a checkpoint of another configuration or of other data; "anyway" continues with it.
    task: what is learned, by its name in tasks/__init__.py; it has groups of its own beside these.
    """

    run_name: str
    output_dir: str = may_change()
    seed: int
    resume: Literal["auto", "anyway"] = may_change()
    task: str
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    trainer: TrainerSettings
    checkpoint: CheckpointSettings
    logger: LoggerSettings

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed must be 0 or more, got {self.seed}", "seed=0")
        if any(part in ("", ".", "..") or part != part.strip() for part in self.run_name.split("/")):
            raise UserError(
                f"run_name={self.run_name!r} is no folder below output_dir", "run_name=NAME, or run_name=GROUP/NAME"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.run_name

"""All settings of a training run: the keys of conf/train.yaml, with a record for each group."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from contextual_cnn.errors import UserError
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.checkpoint import CheckpointSettings
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.logger import LoggerSettings
from contextual_cnn.settings.loss import LossSettings
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings
from contextual_cnn.settings.schedule import ScheduleSettings
from contextual_cnn.settings.trainer import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """run_name: the run's folder below output_dir; the same name resumes.

    seed: every random number of the run depends on it.
    resume: "auto" refuses a checkpoint of another configuration or of other data; "anyway" continues with it.
    """

    run_name: str
    output_dir: str
    seed: int
    resume: Literal["auto", "anyway"]
    model: ModelSettings
    data: DataSettings
    augment: AugmentSettings
    loss: LossSettings
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

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "RunSettings":
        """The records of a checked config."""
        types = get_type_hints(cls)
        groups = {field.name for field in fields(cls) if is_dataclass(types[field.name])}
        return cls(**{key: types[key](**value) if key in groups else value for key, value in config.items()})

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.run_name

"""What a run can learn. A task is listed here, and nowhere else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.errors import UserError
from contextual_cnn.schema import nearest
from contextual_cnn.settings.evaluation import EvaluationSettings
from contextual_cnn.tasks.image_classification.settings import ImageClassificationSettings
from contextual_cnn.tasks.instance_segmentation.settings import InstanceSegmentationSettings
from contextual_cnn.tasks.video_classification.settings import VideoClassificationSettings

if TYPE_CHECKING:  # it brings torch
    from rich.console import Console
    from rich.table import Table

    from contextual_cnn.distributed import World
    from contextual_cnn.task import Task


class TaskSettings(Protocol):
    """A record of settings whose fields are the task's own groups of keys. Its module imports nothing heavy."""

    def open(self) -> "OpenTask":
        """Looks at the data. Raises UserError for what is not there, or not as it should be."""
        ...

    @staticmethod
    def evaluator() -> "Evaluator":
        """What evaluates a checkpoint; imports torch, which takes seconds."""
        ...


class Evaluator(Protocol):
    """A module of the task."""

    def evaluate_checkpoint(
        self, path: Path, state: Mapping[str, Any], settings: EvaluationSettings, world: "World", console: "Console"
    ) -> dict[str, Any]:
        """The report of a file that has been read, complete on rank 0, where it is printed and written too."""
        ...

    def ranking(self, reports: Sequence[Mapping[str, Any]]) -> "Table":
        """Several reports in a table, the best first."""
        ...


class OpenTask(Protocol):
    """A task whose data have been found.

    samples: of the training split.
    settings: with what the data told, such as the number of classes.
    """

    samples: int
    settings: Any

    def check(self, plan: BatchPlan) -> None:
        """Raises UserError for batches that the task cannot use."""

    def load(self) -> "Task":
        """Imports torch, which takes seconds."""
        ...


TASKS: Mapping[str, type[TaskSettings]] = {
    "image_classification": ImageClassificationSettings,
    "video_classification": VideoClassificationSettings,
    "instance_segmentation": InstanceSegmentationSettings,
}


def task_settings(name: str) -> type[TaskSettings]:
    """The record of a task's settings.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"there is no task named {name!r}", nearest("task=", name, TASKS))
    return TASKS[name]

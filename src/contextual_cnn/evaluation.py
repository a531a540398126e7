"""The evaluation of checkpoints, each by the task that it was trained for."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from contextual_cnn.device import set_up_arithmetic
from contextual_cnn.distributed import World, process_group
from contextual_cnn.runs.checkpoint import load_trained
from contextual_cnn.runs.checkpoint_entries import require_entries
from contextual_cnn.runs.run_folder import start_logging
from contextual_cnn.settings.evaluation import EvaluationSettings
from contextual_cnn.settings.keys import LATER_KEYS
from contextual_cnn.tasks import task_settings


def evaluate_checkpoints(checkpoints: Sequence[Path], settings: EvaluationSettings) -> None:
    """Evaluates one after the other; of several of a task, a table follows."""
    with process_group(settings.device) as world:
        set_up_arithmetic()
        console = start_logging(world.is_main)
        found = [_evaluate(path, settings, world, console) for path in checkpoints]
        if not world.is_main:
            return
        for task, reports in groupby(sorted(found, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
            of_task = [report for _, report in reports]
            if len(of_task) > 1:
                console.print(task_settings(task).evaluator().ranking(of_task))


def _evaluate(path: Path, settings: EvaluationSettings, world: World, console: Console) -> tuple[str, dict[str, Any]]:
    """Name of the task, and its report."""
    state = load_trained(path)
    require_entries(state, path, "config")
    task = state["config"].get("task", LATER_KEYS["task"])
    return task, task_settings(task).evaluator().evaluate_checkpoint(path, state, settings, world, console)

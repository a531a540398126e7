"""How a run is shown to a person: a line for each log step, and below the lines a live bar on a terminal."""

import logging
import time
from datetime import timedelta

from rich.console import Console

from contextual_cnn.contracts import by_stage
from contextual_cnn.data.process_pool import progress_bar

log = logging.getLogger(__name__)


def describe(metrics: dict[str, float]) -> str:
    """A log step in one line: losses, recall per stage, lr, speed, most memory of the GPU (or the process's)."""
    losses, recalls = by_stage(metrics, "train/loss"), by_stage(metrics, "train/recall")
    parts = [f"loss {metrics['train/loss']:.3f}"]
    if len(losses) > 1:
        parts[0] += f" ({_list(losses, '.2f')})"
    if recalls:
        parts.append(f"recall {_list(recalls, '.0f')} %")
    parts.append(f"lr {metrics['train/lr']:.2e}")
    parts.append(_speed(metrics["train/images_per_second"]))
    parts.append(f"data wait {metrics['train/data_wait']:.0f} %")
    memory = metrics.get("train/memory_gib", metrics["train/host_memory_gib"])
    parts.append(f"memory {memory:.3g} GiB")
    return ", ".join(parts)


def describe_evaluation(reports: dict[str, dict[str, float]]) -> str:
    """An evaluation in one line: accuracy of each set of weights, recall per stage and speed of the raw ones."""
    parts = [f"{name} top-1 {report['top1']:.2f} top-5 {report['top5']:.2f}" for name, report in reports.items()]
    if recalls := by_stage(reports["raw"], "recall"):
        parts.append(f"recall {_list(recalls, '.0f')} %")
    return ", ".join([*parts, _speed(reports["raw"]["images_per_second"])])


def _speed(images_per_second: float) -> str:
    """9,523 img/s; with a fraction where it counts."""
    return f"{images_per_second:{',.0f' if images_per_second >= 100 else '.3g'}} img/s"


def _list(values: dict[int, float], spec: str) -> str:
    """s3 2.46 s4 1.45: the values after stages 3 and 4."""
    return " ".join(f"s{stage} {value:{spec}}" for stage, value in values.items())


class ProgressDisplay:
    """Shows steps until `steps` are done; use as a context manager."""

    def __init__(self, console: Console, steps: int, steps_per_epoch: int, first_step: int) -> None:
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._first_step, self._started = first_step, time.perf_counter()
        self._bar = None
        if console.is_terminal:
            self._bar = progress_bar(console)
            self._task = self._bar.add_task("starting", total=steps, completed=first_step)

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of a log step."""
        epoch = (step - 1) // self._steps_per_epoch + 1
        if self._bar is not None:  # no metrics in it: they would leave no room for the bar on 80 columns
            self._bar.update(self._task, description=f"epoch {epoch}")
        seconds_per_step = (time.perf_counter() - self._started) / (step - self._first_step)
        eta = timedelta(seconds=round(seconds_per_step * (self._steps - step)))
        log.info("epoch %d step %d/%d: %s, eta %s", epoch, step, self._steps, describe(metrics), eta)

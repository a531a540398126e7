"""How a run is shown to a person: a line for each log step, and below the lines a live bar on a terminal."""

import logging
import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console

from contextual_cnn.data.process_pool import progress_bar

log = logging.getLogger(__name__)


def describe_speed(metrics: Mapping[str, float]) -> str:
    """9,523 img/s; with a fraction where it counts."""
    images_per_second = metrics["images_per_second"]
    return f"{images_per_second:{',.0f' if images_per_second >= 100 else '.3g'}} img/s"


def _describe(metrics: Mapping[str, float]) -> str:
    """What every task has of a log step: lr, speed, waiting, most memory of the GPU (or the process's)."""
    memory = metrics.get("memory_gib", metrics["host_memory_gib"])
    return (
        f"lr {metrics['lr']:.2e}, {describe_speed(metrics)}, "
        f"data wait {metrics['data_wait']:.0f} %, memory {memory:.3g} GiB"
    )


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

    def report(self, step: int, learned: str, metrics: Mapping[str, float]) -> None:
        """A log step: what was learned, in words, and the metrics."""
        epoch = (step - 1) // self._steps_per_epoch + 1
        if self._bar is not None:  # no metrics in it: they would leave no room for the bar on 80 columns
            self._bar.update(self._task, description=f"epoch {epoch}")
        seconds_per_step = (time.perf_counter() - self._started) / (step - self._first_step)
        eta = timedelta(seconds=round(seconds_per_step * (self._steps - step)))
        log.info("epoch %d step %d/%d: %s, %s, eta %s", epoch, step, self._steps, learned, _describe(metrics), eta)

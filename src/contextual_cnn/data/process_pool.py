"""Work on many parts in many processes, with a progress bar; for the scripts that prepare and check data."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PR_SET_PDEATHSIG = 1


@contextmanager
def process_pool(workers: int | None) -> Iterator[ProcessPoolExecutor | None]:
    """Worker processes that end with this one, however it ends.

    Args:
        workers: None takes one for each core that it may use; 1 does the work in this process and yields None.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield None
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),  # a worker has what is imported already
        initializer=_end_with_parent,
        initargs=(os.getpid(),),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_parts(
    pool: ProcessPoolExecutor | None,
    function: Callable[[Any], Any],
    parts: Sequence[Any],
    *,
    title: str,
    sizes: Sequence[int] | None = None,
) -> list[Any]:
    """Calls the function on every part; returns the results in the order of the parts. The first error ends it.

    Args:
        sizes: of the parts, as the bar counts them; None counts parts.
    """
    sizes = sizes if sizes is not None else [1] * len(parts)
    # All processes are forked by this call, before the bar starts its thread
    results, done = (pool.map if pool is not None else map)(function, parts), []
    with progress_bar() as bar:
        task = bar.add_task(title, total=sum(sizes))
        for size, result in zip(sizes, results, strict=True):
            done.append(result)
            bar.advance(task, size)
    return done


def progress_bar(console: Console | None = None) -> Progress:
    """A bar on a console; without one on standard error, which leaves standard output to results."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )


def _end_with_parent(parent: int) -> None:
    """An orphan would go on writing where the next run writes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before the call
        os.kill(os.getpid(), signal.SIGKILL)

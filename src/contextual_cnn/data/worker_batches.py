"""Batches that are made by worker processes: a worker makes whole micro-batches, so nothing is collated."""

import contextlib
import multiprocessing
import os
import select
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from contextual_cnn.data.bad_images import BadImage, BadImages
from contextual_cnn.data.transfer import to_device
from contextual_cnn.errors import UserError


class Made(NamedTuple):
    """What a worker hands over.

    pixels: (B, ..., H, W, 3) uint8. replaced: how many images took the places of others.
    """

    pixels: Tensor
    targets: Tensor
    reports: list[BadImage]
    replaced: int = 0


class Reported(Protocol):
    """Whatever else a worker hands over, it tells of bad images."""

    @property
    def reports(self) -> list[BadImage]: ...


class Workers(Protocol):
    """How many there are, and how many batches each is ahead."""

    @property
    def threads(self) -> int | None: ...
    @property
    def prefetch(self) -> int: ...


class _Numbered(Dataset):
    """Whatever `make` gives for a number; a UserError is handed over, for DataLoader would rewrite it."""

    def __init__(self, make: Callable[[int], Reported]) -> None:
        self._make = make

    def __getitem__(self, n: int) -> Reported | UserError:
        try:
            return self._make(n)
        except UserError as error:
            return error


def worker_loader(
    make: Callable[[int], Reported], numbers: Iterable[int], settings: Workers, device: torch.device
) -> DataLoader:
    """The batches of these numbers, in their order.

    Args:
        make: what a worker does; a function of a module, with its arguments, as it is sent there.
    """
    # Forked from a server that has no threads: a worker forked from a process that has some (W&B, checkpoints) may
    # wait for ever for a lock that one of them held
    multiprocessing.set_forkserver_preload(["__main__", _module_of(make)])
    return DataLoader(
        _Numbered(make),
        sampler=numbers,
        batch_size=None,
        num_workers=settings.threads or 1,
        prefetch_factor=settings.prefetch,
        persistent_workers=True,
        multiprocessing_context="forkserver",
        worker_init_fn=partial(_end_with, os.getpid()),
        pin_memory=device.type == "cuda",
    )


def _end_with(trainer: int, _: int) -> None:
    """In a worker: it ends when the trainer has, however that ended.

    torch watches the worker's parent, which is the fork server; and that lives as long as its workers.
    """

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            select.select([os.pidfd_open(trainer)], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="trainer", daemon=True).start()


def _module_of(make: Callable) -> str:
    while isinstance(make, partial):
        make = make.func
    return make.__module__


def on_device(loader: DataLoader, bad: BadImages, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(B, ..., 3, H, W) uint8 channels_last, (B,) int64, and how many images took the places of others."""
    for pixels, targets, _, replaced in received(loader, bad):
        pixels, targets = (to_device(tensor, device) for tensor in (pixels, targets))
        yield pixels.movedim(-1, -3), targets, replaced


def received(loader: DataLoader, bad: BadImages) -> Iterator[Any]:
    """What the workers made, one after the other; what they report is reported."""
    batches = iter(loader)
    try:
        for made in batches:
            if isinstance(made, UserError):
                raise made
            for report in made.reports:
                bad.report(report)
            yield made
    except BaseException:
        # An error keeps the loader alive until it is collected as garbage. By then the queue that tells a worker to
        # end is closed, and torch waits five seconds for each
        batches._shutdown_workers()  # type: ignore[attr-defined] # the type of one without workers
        loader._iterator = None
        raise

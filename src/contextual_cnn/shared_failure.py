"""What ends one process of a run ends all of them, at once and with the cause.

NCCL tells a process nothing of one that has ended: it waits in a collective until the time is up, minutes later. So the
cause takes another way, the store through which the processes have met, where a thread of each of them looks for it.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from types import TracebackType
from typing import NamedTuple

from torch.distributed import Store

from contextual_cnn.errors import LostProcess, UserError, report_status

_EVERY = 1.0  # seconds between two looks
_GRACE = 5.0  # seconds for the main thread to end by itself, as it does where the collectives raise an error
_PATIENCE = 10.0  # seconds for all to have seen it, before the process that holds the store ends


class Cause(NamedTuple):
    """Why a process has ended. status: its exit status; 2 is a mistake, which no restart puts right."""

    rank: int
    host: str
    status: int
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} has ended: {self.text}"


class SharedFailure:
    """A context manager: an error that leaves it ends the other processes too, wherever they are.

    Args:
        store: of the process group; it lives in the process of rank 0.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store.clone(), rank, size  # a connection of its own
        self._closed, self._told = threading.Event(), threading.Event()
        self._cause: Cause | None = None

    def __enter__(self) -> "SharedFailure":
        threading.Thread(target=self._watch, name="failure", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._closed.set()
        if error is None:
            return
        with contextlib.suppress(RuntimeError):  # the store has gone: all of them have ended, or rank 0 has
            if not isinstance(error, LostProcess):
                self._tell(_cause_of(error, self._rank))
            elif self._cause is None:  # nobody has said anything, and a store that is cut off never answers
                return
            self._wait_for_all()

    def cause(self) -> Cause | None:
        """Why another process has ended, if it was able to say so."""
        self._told.wait(2 * _EVERY)
        return self._cause

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not self._closed.wait(_EVERY):
                if self._store.check(["failure"]):
                    self._cause = Cause(**json.loads(self._store.get("failure")))
                    self._store.add("seen", 1)
                    self._told.set()
                    self._end(self._cause)

    def _end(self, cause: Cause) -> None:
        """From this thread: the main thread may be in a call that never returns."""
        if self._closed.wait(_GRACE):
            return
        if self._rank == 0:
            with contextlib.suppress(RuntimeError):
                self._wait_for_all()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {cause}", file=sys.stderr, flush=True)
        os._exit(0 if cause.status == 2 and report_status(cause.status) else 1)

    def _tell(self, cause: Cause) -> None:
        self._store.compare_set("failure", "", json.dumps(cause._asdict()))
        if not self._told.is_set():
            self._store.add("seen", 1)

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while self._store.add("seen", 0) < self._size and time.monotonic() < deadline:
            time.sleep(0.1)


def _cause_of(error: BaseException, rank: int) -> Cause:
    if isinstance(error, UserError):
        return Cause(rank, socket.gethostname(), 2, error.cause)
    first_line = (str(error).splitlines() or [""])[0]
    return Cause(rank, socket.gethostname(), 1, f"{type(error).__name__}: {first_line:.300}")

"""Shows where a process hangs: the stacks of its threads, once it has not got on for too long."""

import faulthandler
import logging
import sys
import threading
import time

log = logging.getLogger(__name__)


class Watchdog:
    """A context manager; as long as it is open, a thread watches how long ago the last `beat` was.

    It ends nothing: the other processes give up on one that hangs, and torchrun then ends it.

    Args:
        seconds: without a beat, until the stacks are printed to standard error, once.
    """

    def __init__(self, seconds: float, rank: int) -> None:
        self._seconds, self._rank = seconds, rank
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.beat("the start")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def beat(self, what: str) -> None:
        """The process has got on, and now does this."""
        self._what, self._since = what, time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(self._seconds / 20):
            silent = time.monotonic() - self._since
            if silent > self._seconds:
                log.warning("rank %d has been in %s for %.0f s; its stacks follow", self._rank, self._what, silent)
                faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
                return

"""Requests to stop: signals of a scheduler or a person, and the run's own time limit.

Until the first step is made there is nothing to lose, and a signal ends the process wherever it is (`end_when_asked`).
From then on a signal is a flag that the loop looks at between steps (`StopRequest`).

Imported before everything that takes time, so this module and what it imports take none.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from contextual_cnn.errors import STOPPED, report_status

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_IMPATIENT_AFTER = 1.0  # seconds; a launcher may pass on a SIGINT that this process has had already
_PATIENCE = 10.0  # seconds after a signal: for the first step, and for the end of a process that has saved


class _Watch(threading.Thread):
    """Ends the process after a signal, if it does not end by itself.

    A thread, because Python's handlers wait until the main thread comes back from a native call: a compilation, a
    rendezvous, an import. The system's own handler tells the thread by a pipe at once.

    Attributes:
        patience: seconds from the signal on.
        not_before: time.monotonic() until which there is something to lose.
    """

    def __init__(self) -> None:
        super().__init__(name="stop", daemon=True)
        self.patience, self.not_before = 0.0, 0.0

    def listen(self) -> None:
        """To be called by the main thread, once."""
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in _heard():
            signal.signal(number, _leave_to_the_watch)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_hear_nothing)
        self.start()

    def run(self) -> None:
        while (number := os.read(self._reader, 1)[0]) not in _SIGNALS:
            pass
        asked = time.monotonic()
        while time.monotonic() < max(asked + self.patience, self.not_before):
            time.sleep(0.05)
        is_reported = report_status(STOPPED)
        if os.environ.get("RANK", "0") == "0":
            message = (
                f"stopped: {signal.Signals(number).name} received; nothing is lost, start the same command again\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, message.encode())
        os._exit(0 if is_reported else STOPPED)


_watch = _Watch()


def end_when_asked() -> None:
    """From now on a signal ends this process with STOPPED: the first line of an entry script.

    SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and, unless nohup has it ignored, SIGHUP. The death of torchrun counts as SIGTERM:
    it gives every worker a session of its own, so that not even closing its terminal reaches them.
    """
    _watch.listen()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class StopRequest:
    """Whether this process has been asked to stop; a context manager that listens to signals as long as it is open.

    A signal only sets a flag: the loop looks at it between steps. A second SIGINT ends the process at once.

    Args:
        max_seconds: after this time a stop is due by itself; None never.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self._deadline = time.monotonic() + max_seconds if max_seconds is not None else float("inf")
        self._signal: str | None = None
        self._interrupted_at: float | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._note) for number in _heard()}
        _watch.patience = _PATIENCE
        return self

    def __exit__(self, *_: object) -> None:
        _watch.not_before = time.monotonic() + _PATIENCE
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def protect(self) -> None:
        """A step has been made that is not saved: from now on nobody but the loop ends this process."""
        _watch.not_before = float("inf")

    @property
    def reason(self) -> str | None:
        """What asked to stop, as a person would say it; None if nothing did."""
        return self._signal or ("trainer.max_time is over" if time.monotonic() > self._deadline else None)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > _IMPATIENT_AFTER:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            self._interrupted_at = self._interrupted_at or now
        self._signal = self._signal or f"{signal.Signals(number).name} received"


def _heard() -> list[signal.Signals]:
    """SIGHUP, of a terminal that is closed, is ignored under nohup, and then stays so."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in _SIGNALS if not (ignored and number == signal.SIGHUP)]


def _leave_to_the_watch(*_: object) -> None:
    """Python's part of the handler; without one, the pipe would not be written to."""


def _hear_nothing() -> None:
    """In a forked child, whose signals are not this process's."""
    signal.set_wakeup_fd(-1)
    for number in _heard():
        signal.signal(number, signal.SIG_DFL)

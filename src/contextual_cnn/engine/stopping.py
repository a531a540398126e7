"""Requests to stop: signals of a scheduler or a person, and the run's own time limit."""

import os
import re
import signal
import time
from types import FrameType
from typing import Any

from contextual_cnn.errors import UserError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_IMPATIENT_AFTER = 1.0  # seconds; a launcher may pass on a SIGINT that this process has had already
_MOST_HOURS = 1000


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
        # SIGHUP, of a terminal that is closed, is ignored under nohup, and then stays so
        hang_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
        self._handlers = {number: signal.signal(number, self._note) for number in (*_SIGNALS, *hang_up)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

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


def seconds_of(max_time: str | float | None) -> float | None:
    """A time limit in seconds: "3:50:00" or "3:50" (hours first), or a number of hours.

    Raises:
        UserError: neither of them.
    """
    if max_time is None:
        return None
    if isinstance(max_time, str):
        match = re.fullmatch(r"(\d+):([0-5]\d)(?::([0-5]\d))?", max_time)
        hours = match and sum(int(part or 0) / 60**i for i, part in enumerate(match.groups()))
    else:
        hours = max_time  # YAML reads an unquoted 3:50:00 as 13800, its seconds
    if not hours or not 0 < hours <= _MOST_HOURS:
        raise UserError(
            f"trainer.max_time={max_time} is no time limit",
            "trainer.max_time=3:50:00 (hours:minutes:seconds; quoted in a YAML file) or trainer.max_time=3.8 (hours)",
        )
    return 3600 * hours

"""How a command ends before its time, other than by a defect: a user's mistake, or a request to stop."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from contextual_cnn.text import print_any_text, printable

STOPPED = 75  # exit status EX_TEMPFAIL: nothing is wrong, start the same command again


class UserError(Exception):
    """Something only the user can put right. The entry scripts print it without a traceback and exit with 2.

    Names within it may be hostile: they are made printable here, once for all who raise it.

    Args:
        cause: what is wrong, naming the value, the file or the key.
        fix: what to do about it, as something that can be typed.
    """

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause, fix)
        self.cause = printable(cause)
        self.fix = printable(fix)

    def __str__(self) -> str:
        return f"{self.cause}\n  fix: {self.fix}"


class Stopped(Exception):
    """A signal or a time limit ended the run with everything saved. The entry scripts exit with STOPPED."""


class LostProcess(Exception):
    """Another process of the run has died or does not answer. The entry scripts exit with 1, and torchrun restarts."""


def report_status(status: int) -> bool:
    """Writes the exit status where scripts/launch.sh reads it; whether there is somebody who does.

    torchrun makes a restart or a 1 of every status but 0. A process that has reported one ends with 0.
    """
    path = os.environ.get("CONTEXTUAL_CNN_STATUS_FILE")
    if path is None or (status == 0 and os.environ.get("LOCAL_RANK", "0") != "0"):
        return False
    with open(path, "w") as file:
        file.write(f"{status}")
    return True


def reported_status() -> str | None:
    """What a process of this node has written there; "" if nothing yet, None if nobody reads it."""
    path = os.environ.get("CONTEXTUAL_CNN_STATUS_FILE")
    return Path(path).read_text() if path is not None else None


def run_script(main: Callable[[], None]) -> None:
    """Runs a plain script's main; a user's mistake is printed as cause and fix and ends it with status 2."""
    print_any_text()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")

"""What the launcher says of this process, by the environment: before there is a process group, and without torch."""

import os
import sys

from contextual_cnn.errors import UserError

STARTED_BY = "scripts/launch.sh or torchrun sets it; for one process: unset RANK LOCAL_RANK WORLD_SIZE"


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return launched("RANK", 0) == 0


def world_size() -> int:
    """Number of processes of the run."""
    return launched("WORLD_SIZE", 1)


def cores() -> int:
    """CPU cores that this process may use, its share of those that its node's processes have; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // launched("LOCAL_WORLD_SIZE", 1))


def leave_out(module: str) -> None:
    """From now on a module is missing in this process; who imports it if it is there goes on without it."""
    sys.modules.setdefault(module, None)  # type: ignore[arg-type] # which is how Python says so


def launched(name: str, least: int) -> int:
    """A number that the launcher has set; without a launcher the least there can be.

    Raises:
        UserError: it is not a number.
    """
    text = os.environ.get(name, str(least))
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise UserError(f"{name}={text} in the environment is not a number from {least} on", STARTED_BY)
    return int(text)

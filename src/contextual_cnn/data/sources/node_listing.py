"""A listing that the processes of a node make once, and hold once."""

import hashlib
import os
import pickle
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from contextual_cnn.errors import reported_status
from contextual_cnn.launcher import launched

_PATIENCE = 3600  # seconds for the first process of the node; then each makes its own
_GRACE = 5  # seconds for another listing to be replaced by the one that is looked for
_FAILED = b""


def once_a_node(key: str, of: str, make: Callable[[], Any]) -> Any:
    """What `make` gives: made by the first process of this node, and picked up by the others.

    They find it by a small file in a folder of this user's own, which holds a pickle: the arrays are in memory that
    the first process shares (`SharedArrays`). Where that is not possible, each process makes its own.

    Args:
        key: tells this listing from others of the same start. of: what it is made of; a process that has another
            one in mind makes its own.
    """
    if launched("LOCAL_WORLD_SIZE", 1) == 1 or (folder := _own_folder()) is None:
        return make()
    note = folder / f"listing_{os.getppid()}_{_start()}_{key}"
    head = hashlib.sha256(of.encode("utf-8", "surrogateescape")).digest()
    return _made(note, head, make) if launched("LOCAL_RANK", 0) == 0 else _picked_up(note, head, make)


def _made(note: Path, head: bytes, make: Callable[[], Any]) -> Any:
    note.unlink(missing_ok=True)
    try:
        made = make()
    except BaseException:
        _leave(note, _FAILED)  # the others come to the same mistake by themselves
        raise
    _leave(note, head + pickle.dumps(made))
    return made


def _leave(note: Path, content: bytes) -> None:
    partial = note.with_suffix(".partial")
    with suppress(OSError):
        partial.write_bytes(content)
        partial.replace(note)


def _picked_up(note: Path, head: bytes, make: Callable[[], Any]) -> Any:
    now = started = time.monotonic()
    other_since: float | None = None
    while now - started < _PATIENCE and now - (other_since or now) < _GRACE:
        content: bytes | None = None
        with suppress(OSError):  # not there yet, or of a process that has ended: an earlier start's
            content = note.read_bytes()
            if content.startswith(head):
                return pickle.loads(content[len(head) :])
        if content == _FAILED or reported_status() not in (None, "", "0"):  # the first process has ended
            break
        # An earlier one that is about to be replaced, or the first process has other data in mind
        is_other = content is not None and not content.startswith(head)
        other_since = (other_since or now) if is_other else None
        time.sleep(0.05)
        now = time.monotonic()
    return make()


def _start() -> str:
    """What no two starts that could meet in one folder have in common."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    return "_".join("".join(filter(str.isalnum, os.environ.get(name, "")))[:40] for name in names)


def _own_folder() -> Path | None:
    """A folder where only this user reads and writes; None where there cannot be one."""
    folder = Path(tempfile.gettempdir()) / f"contextual_cnn_{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if is_own else None

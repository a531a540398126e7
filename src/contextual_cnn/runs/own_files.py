"""The files that a run writes: never through a link that somebody has put there, never into a folder or a pipe."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contextual_cnn.errors import UserError


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a regular file of this very name, made if it is not there.

    Args:
        flags: of os.open, for example os.O_WRONLY | os.O_APPEND.

    Raises:
        OSError: it is a link, a folder or a pipe, or may not be opened.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link, which is not followed; remove it", str(path))
    # O_NONBLOCK: a pipe without a reader would keep us waiting
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file; remove it", str(path))
    return descriptor


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """The path of a new file; on leaving, it takes the place of the old one, or of a link to elsewhere.

    Raises:
        OSError: it could not be written, or there is a folder of that name.
    """
    new = path.with_name(f"new_{path.name}")
    new.unlink(missing_ok=True)
    try:
        yield new
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def check_writable(path: Path, key: str) -> None:
    """Before the work is done rather than after it. Raises UserError, naming the key that asked for the file."""
    if path.is_dir() or not path.parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(f"{key}: {path} cannot be written: {reason}", f"{key}={key}.csv")

"""Compiled libraries, kept in the user's cache from one process to the next.

What is loaded is run by this process, so a library from the cache must be whole and nobody else's work. A truncated one
would end the process with a bus error, and on a folder that many may write to anybody could leave one, as its name
follows from public data. So a library's name ends in the hash of its content, and it and its folder belong to this user
and are writable to no other. Whatever is not so, or does not load, is made again.

There is no lock, as torch.utils.cpp_extension has one: a process that is killed while it builds leaves it behind, and
all later ones wait for it. Here whoever finds no library makes one and puts it in place whole, and so may two at once.
"""

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)


def load_cached(name: str, build: Callable[[Path], None], load: Callable[[Path], None]) -> None:
    """Loads a library from the cache, or else builds it, keeps it and loads it.

    Args:
        name: another one for everything that the library depends on: source, compiler flags, processor.
        build: writes the library to the path that it is given.
        load: what loads it, and raises OSError if it cannot.

    Raises:
        OSError: it could not be kept or, new as it is, not be loaded. What `build` raises is passed on.
    """
    if not hasattr(os, "geteuid"):
        raise OSError("this system does not tell who owns a file")
    with _own_folder() as folder:
        for library in sorted(folder.glob(f"{name}-*.so")):
            try:
                _check(library)
                load(library)
            except OSError as error:
                log.warning("%s is not used, and made again: %s", library, error)
            else:
                return
        load(_put(folder, name, build))


@contextmanager
def _own_folder() -> Iterator[Path]:
    """The user's cache, or a folder that is gone afterwards if there is none that only this user may write to."""
    for root in _cache_roots():
        folder = root / "contextual_cnn"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stat.S_ISDIR(folder.lstat().st_mode) and _is_ours(folder):
                folder.chmod(0o700)  # whoever made it, with whatever umask
            _check_owner(folder, stat.S_ISDIR)
        except OSError as error:
            log.warning("compiled kernels are not kept in %s: %s", folder, error)
            continue
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="contextual_cnn_") as temporary:
        yield Path(temporary)


def _cache_roots() -> Iterator[Path]:
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the XDG specification ignores all others
        yield Path(named)
    with suppress(RuntimeError):  # a user without a home
        yield Path.home() / ".cache"


def _check(library: Path) -> None:
    """Raises OSError if the file is not this user's, or not what its name says."""
    _check_owner(library, stat.S_ISREG)
    if library.stem.rpartition("-")[2] != _digest(library):
        raise OSError("it is damaged")


def _check_owner(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raises OSError unless the path is no link, is of this kind, and this user alone may write to it."""
    mode = path.lstat().st_mode
    if not is_kind(mode) or not _is_ours(path) or mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"it is a link, or not only this user may write to it ({stat.filemode(mode)})")


def _is_ours(path: Path) -> bool:
    return path.lstat().st_uid == os.geteuid()


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:32]


def _put(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Builds a library and puts it into the folder whole, also if the machine loses its power the next moment."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "library.so"
        build(made)
        made.chmod(0o600)
        _sync(made)
        library = folder / f"{name}-{_digest(made)}.so"
        made.replace(library)
    with suppress(OSError):  # there are file systems whose folders cannot be synchronised
        _sync(folder)
    return library


def _sync(path: Path) -> None:
    """Makes a file's content or a folder's names durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

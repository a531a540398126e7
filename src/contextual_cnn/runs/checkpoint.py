"""One checkpoint file: plain tensors and numbers, written whole or not at all, read without running anything in it.

A file is what torch.save writes and, after it, one line of text that makes it complete:

    contextual-cnn checkpoint {"bytes": 133719, "sha256": "9f86d081...", "step": 1251}

bytes and sha256 are of all that comes before the line. torch.load and zip tools pass over it; `tail -n 1` shows it.
In the file itself, it is moved, copied and replaced together with what it vouches for.
"""

import builtins
import errno
import hashlib
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from contextual_cnn.errors import UserError
from contextual_cnn.runs.checkpoint_entries import FORMAT, OTHER_FILE, DamagedCheckpoint, check_entries

_MARK = b"\ncontextual-cnn checkpoint "
_LONGEST_LINE = 256  # bytes; a manifest has about 150
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's last line: length and SHA-256 of what comes before it, and the step, to choose by."""

    bytes: int
    sha256: str
    step: int

    def line(self) -> builtins.bytes:
        return _MARK + json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, file: BinaryIO) -> "Manifest | None":
        """The manifest of an open file; None if it has none, or one that does not fit the file's length."""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LONGEST_LINE))
        end = file.read()
        line = end[end.rfind(_MARK) :] if _MARK in end else b""
        try:
            manifest = cls(**json.loads(line[len(_MARK) :]))
        except (ValueError, TypeError):
            return None
        if not (type(manifest.bytes) is type(manifest.step) is int and manifest.step >= 0):
            return None
        # Spelled exactly as `line` spells it, so that no changed bit passes
        return manifest if line == manifest.line() and size == manifest.bytes + len(line) else None


def write_checkpoint(
    state: dict[str, Any], path: Path, previous: Path | None = None, second: Path | None = None
) -> None:
    """Writes beside the old file, then puts the new one in its place: a kill at any moment leaves a whole file.

    Args:
        previous: where the file that is replaced is kept, if it is.
        second: another name that the new file gets, before it gets the first.

    Raises:
        OSError, RuntimeError: it could not be written; what was there is untouched.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            hashing = _HashingFile(file)
            torch.save(state | {"format": FORMAT}, cast(BinaryIO, hashing))
            file.write(Manifest(hashing.bytes, hashing.digest.hexdigest(), state["step"]).line())
            file.flush()
            os.fsync(file.fileno())
        torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)  # what cannot be read is not kept
        if second is not None:
            _name_again(temporary, second)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    kept = _kept_name(path, previous) if previous is not None and path.exists() else None
    temporary.replace(path)
    if kept is not None and previous is not None:
        kept.replace(previous)
    _sync_folder(path.parent)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU, after its length and hash have been checked; nothing in the file is executed.

    Takes no more memory than the file has bytes. Every entry that is there is of its type; which of them must be there
    beside "model" and "step", the caller asks by `require_entries`.

    Raises:
        DamagedCheckpoint: it cannot be read, or is not what was written.
        NewerFormat: a later version has written it.
        UserError: no such file, not a checkpoint of this program, or one that wants to run code.
    """
    with _reading(path) as file:  # opened once: a run that is still training may put another in its place
        size = _check_integrity(file, path)
        _check_archive(file, path, size)
        state = _read(file, path)
    check_entries(state, path, size)
    return state


def map_checkpoint(path: Path) -> dict[str, Any]:
    """As `load_checkpoint`, of a file that another process of this machine has just read and checked.

    Its tensors are those pages of the file that the machine holds already, one copy for all processes.
    """
    with _reading(path) as file:
        size = _manifest(file, path).bytes
        state = _map(file, path)
    check_entries(state, path, size)
    return state


def load_trained(path: Path) -> dict[str, Any]:
    """As `load_checkpoint`, without the optimizer's state: half of the file, which is neither read nor checked.

    What is read is checked by the sums that the archive has for each tensor.
    """
    with _reading(path) as file:
        size = _manifest(file, path).bytes
        try:
            _check_archive(file, path, size)
            state = _map(file, path)
            check_entries(state, path, size)
        except UserError:
            _check_integrity(file, path)  # damage comes before any other reason
            raise
        if not _weights_are_whole(file, state):
            raise DamagedCheckpoint(f"{path} is damaged: its weights are not those that were written", OTHER_FILE)
    return {name: entry for name, entry in state.items() if name != "optimizer"}


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of this program, damaged or not: by its last line, or else by its entries."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE))
            if _MARK in file.read():
                return True
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # another kind of file, or one that cannot be read at all
        return False
    return isinstance(content, dict) and {"format", "model", "best"} <= content.keys()


def step_of(path: Path) -> int | None:
    """The step by the file's manifest, without reading the rest; None without a manifest.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    with _reading(path) as file:
        manifest = Manifest.read(file)
    return manifest.step if manifest is not None else None


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """An open file. A pipe or a socket, which would keep its reader waiting, is refused.

    Raises:
        UserError: there is no such file.
        DamagedCheckpoint: something else than a file, or one that cannot be opened or read.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is not a file")
            yield file
    except FileNotFoundError as error:
        raise UserError(
            f"there is no checkpoint {path}", "give a run folder (outputs/NAME) or a .pt file in it"
        ) from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror or error}", OTHER_FILE) from error


class _HashingFile:
    """A binary file that knows the length and the hash of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _manifest(file: BinaryIO, path: Path) -> Manifest:
    manifest = Manifest.read(file)
    if manifest is None:
        raise DamagedCheckpoint(
            f"{path} is no complete checkpoint: the manifest at its end is missing or does not fit its length",
            OTHER_FILE,
        )
    return manifest


def _check_integrity(file: BinaryIO, path: Path) -> int:
    """The length of what comes before the manifest, which it fits."""
    manifest = _manifest(file, path)
    digest, left = hashlib.sha256(), manifest.bytes
    file.seek(0)
    while left and (block := file.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    if digest.hexdigest() != manifest.sha256:
        raise DamagedCheckpoint(f"{path} is damaged: its SHA-256 is not the one it was written with", OTHER_FILE)
    file.seek(0)
    return manifest.bytes


def _check_archive(file: BinaryIO, path: Path, size: int) -> None:
    """A zip file as torch.save writes it: nothing in it is compressed, so that nothing grows when it is read."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except OSError:
        raise
    except Exception as error:  # BadZipFile, or what a directory that makes no sense leads to
        raise UserError(f"{path} is no checkpoint of this program: {error}", OTHER_FILE) from error
    file.seek(0)
    is_first = file.read(4) == b"PK\x03\x04"  # else torch would take the file for one of its older formats
    is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not (is_first and is_stored and sum(entry.file_size for entry in entries) <= size):
        raise UserError(
            f"{path} is refused: it is compressed, or it holds more than its {size} bytes",
            "use no file from where this one came; a checkpoint of this program is written as it is",
        )
    file.seek(0)


def _map(file: BinaryIO, path: Path) -> Any:
    """The file that is open, whatever has its name by now; pages are read when they are used."""
    return _read(f"/proc/self/fd/{file.fileno()}", path, mmap=True)


def _weights_are_whole(file: BinaryIO, state: dict[str, Any]) -> bool:
    """Whether the pickle and the tensors of "model" and "ema" are as they were written."""
    tensors = [*state["model"].values(), *(state.get("ema") or {}).values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        # torch numbers what it pickles, and model and ema are pickled first
        numbered = [entries.get(f"data/{number}") for number in range(len(tensors))]
        first = [entry for entry in numbered if entry is not None and entry.file_size][: len(storages)]
        if sum(entry.file_size for entry in first) != sum(storage.nbytes() for storage in storages.values()):
            return False
        others = [entry for name, entry in entries.items() if not name.startswith("data/")]
        return all(_is_whole(archive, entry) for entry in (*others, *first))


def _is_whole(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(entry) as content:
            while content.read(_BLOCK):
                pass
    except OSError:
        raise
    except Exception:  # BadZipFile, or whatever a changed header leads to
        return False
    return True


def _read(file: BinaryIO | str, path: Path, mmap: bool = False) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # whole, but not by this program: UnpicklingError, or anything at all
        raise UserError(
            f"{path} is refused: it holds something else than tensors and numbers, and nothing in it was run "
            f"({_refused_part(error)})",
            "use no file from where this one came; a checkpoint of this program never needs that",
        ) from error


def _refused_part(error: Exception) -> str:
    """What the unpickler stopped at, without torch's advice to switch the check off."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return lines[0].split(". ")[0] if lines else type(error).__name__


def _kept_name(path: Path, previous: Path) -> Path | None:
    """Has the file kept when `path` is replaced, as what is returned; it becomes `previous` after that.

    `path` is there at every moment, as somebody may be about to read it, and a replacement that fails costs neither
    file. None where the file system has no hard links: the file is then moved to `previous` at once.
    """
    link = previous.with_suffix(".tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        path.replace(previous)
        return None
    return link


def _name_again(path: Path, name: Path) -> None:
    """Gives a file a second name, in the place of what had it; a copy where the file system has no hard links."""
    temporary = name.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    temporary.replace(name)
    _sync_folder(name.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The checkpoints of one run: when they are due, writing them beside the training, and which one to go on from."""

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contextual_cnn.errors import UserError
from contextual_cnn.launcher import is_main_process
from contextual_cnn.runs.checkpoint import load_checkpoint, map_checkpoint, step_of, write_checkpoint
from contextual_cnn.runs.checkpoint_entries import NewerFormat
from contextual_cnn.settings.checkpoint import CheckpointSettings

log = logging.getLogger(__name__)

FILES = 4  # at most at once: last, previous, best, and the one that is being written
_RETRY_AFTER = 60  # seconds after a write that failed
_BUDGET = 0.01  # share of a run's time that copies for checkpoints may take, those of best states aside
_CHEAP = 0.02  # seconds of a copy that nobody minds


class CheckpointStore:
    """`last.pt` to resume from, `previous.pt` to fall back to, `best.pt` to evaluate; each is a whole state.

    Args:
        folder: created when the run starts.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self.settings = settings
        self._files = tuple(folder / f"{name}.pt" for name in ("last", "previous", "best"))
        self.last, self.previous, self.best = self._files
        self.folder = folder
        self._last_is_whole = False  # as far as this process knows; only then may it replace previous.pt
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None  # None: nothing is being written
        self._next: _Snapshot | None = None  # a best state, to be written after the one that is being written
        self._spare: list[_Snapshot] = []  # whose memory is used again
        self._failure: UserError | None = None
        self._saved_step, self._saved_at, self._copied_in = 0, time.monotonic(), 0.0

    def warn_of_little_room(self, state: dict[str, Any]) -> None:
        """Warns in time that the disk will not hold this state as often as the run keeps it."""
        try:
            there = sum(path.stat().st_size for path in self._files if path.exists())
            needed, free = FILES * tensor_bytes(state) - there, shutil.disk_usage(self.folder).free
        except OSError as error:
            log.warning("the room for checkpoints in %s cannot be told: %s", self.folder, error)
            return
        if needed > free:
            log.warning(
                "the checkpoints will need %.0f MiB, and %s has %.0f MiB free: make room before they fill it",
                *(needed / 2**20, self.folder, free / 2**20),
            )

    def can_afford(self) -> bool:
        """Whether a save now holds nobody up: nothing is being written, and its copy is cheap for the time since."""
        seconds = time.monotonic() - self._saved_at
        return self._writer is None and (self._copied_in <= _CHEAP or self._copied_in <= _BUDGET * seconds)

    def is_due(self, step: int) -> bool:
        """Whether a state inside an epoch is worth saving now, or one that could not be written is tried again.

        Where the one before is still being written it stays due.
        """
        seconds = time.monotonic() - self._saved_at
        return self._writer is None and bool(
            (self.settings.every_steps and step - self._saved_step >= self.settings.every_steps)
            or (self.settings.every_minutes and seconds >= 60 * self.settings.every_minutes)
            or (self._failure and seconds >= _RETRY_AFTER)
        )

    def save(self, state: dict[str, Any], *, is_best: bool = False) -> None:
        """Copies the state and returns; a thread writes the copy.

        Where the one before is still being written, a best state is kept in memory until its turn comes, and any other
        waits here: ask `can_afford` or `is_due` first. A write that fails is a warning, and the files that were there
        are intact.
        """
        if not is_best:
            self.wait()
        started = time.monotonic()
        snapshot = (self._spare.pop() if self._spare else _Snapshot()).take(state, is_best)
        self._saved_step, self._saved_at = state["step"], time.monotonic()
        self._copied_in = self._saved_at - started
        with self._lock:
            if self._writer is not None:
                self._next = snapshot
                return
            self._writer = threading.Thread(target=self._write_all, args=(snapshot,), name="checkpoint")
            self._writer.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if (writer := self._writer) is not None:
            writer.join()

    def close(self) -> None:
        """Waits for the last write.

        Raises:
            UserError: it failed, so the newest state is not on disk.
        """
        self.wait()
        if self._failure is not None:
            raise self._failure

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be used, of last, previous and best; None if there is none at all.

        One that cannot is named, whatever is wrong with it, and the next older one is taken.

        Raises:
            UserError: there are some, and none can be used; or the newest one is of a later version of this program,
                which an older one must not be put in the place of.
        """
        unusable = []
        # Those without a readable manifest first, so that they are named
        for path in sorted(filter(_is_there, self._files), key=_step_or_infinity, reverse=True):
            if path.is_symlink() and is_main_process():
                log.warning("%s is a link to %s", path, os.path.realpath(path))
            try:
                state = load_checkpoint(path)
            except NewerFormat:
                raise
            except UserError as error:
                unusable.append(error.cause)
                if is_main_process():
                    log.warning("%s; looking for an older one", error.cause)
            else:
                self._goes_on_from(path, state)
                return path, state
        if unusable:
            raise UserError(
                f"none of the checkpoints of this run can be used: {'; '.join(unusable)}",
                f"run_name=NEW_NAME starts from zero; so does the same command after the removal of {self.folder}",
            )
        return None

    def number_of(self, path: Path) -> int:
        """Of a checkpoint's file, for another process to find it by."""
        return self._files.index(path)

    def mapped(self, number: int) -> tuple[Path, dict[str, Any]]:
        """The checkpoint that another process of this machine has found to be the newest, and checked."""
        path = self._files[number]
        state = map_checkpoint(path)
        self._goes_on_from(path, state)
        return path, state

    def _goes_on_from(self, path: Path, state: dict[str, Any]) -> None:
        self._last_is_whole, self._saved_step = path == self.last, state["step"]

    def _write_all(self, snapshot: "_Snapshot") -> None:
        """In the writer's thread: this one, and what has come meanwhile."""
        while True:
            self._write(snapshot)
            self._spare.append(snapshot)
            with self._lock:
                if self._next is None:
                    self._writer = None
                    return
                snapshot, self._next = self._next, None

    def _write(self, snapshot: "_Snapshot") -> None:
        state = snapshot.state
        try:
            snapshot.wait()
            _check_finite(state)
            self._make_way()
            # Best first: a kill in between leaves a best.pt that is the newest, and never one that last.pt is ahead of
            previous = self.previous if self._last_is_whole else None
            write_checkpoint(state, self.last, previous, self.best if snapshot.is_best else None)
        except Exception as error:  # a disk, a network file system and torch.save fail in many ways
            self._failure = self._explain(error, state["step"])
            log.warning("%s; the run goes on and tries again", self._failure.cause)
        else:
            self._last_is_whole, self._failure = True, None

    def _make_way(self) -> None:
        """What a run left behind that was killed while it wrote is removed; a folder in a file's place is kept."""
        for path in self._files:
            path.with_suffix(".tmp").unlink(missing_ok=True)
            if path.is_dir() and not path.is_symlink():
                path.rename(path.with_suffix(".folder"))

    def _explain(self, error: Exception, step: int) -> UserError:
        """Of a full disk torch.save says "unexpected pos": the system's own error is behind that."""
        try:
            room = os.statvfs(self.folder)
            free = f"{room.f_bavail * room.f_frsize / 2**20:.0f} MiB free"
        except OSError:
            free = "the folder is gone"
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        return UserError(
            f"the checkpoint of step {step} was not written to {self.folder}: {reason!s:.200} ({free}); "
            "what was written before is intact",
            "make room or make the folder writable, then start the same command again: it resumes",
        )


def _is_there(path: Path) -> bool:
    """Whether there is anything of that name; what cannot even be looked at counts as well."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _step_or_infinity(path: Path) -> float:
    try:
        step = step_of(path)
    except UserError:
        step = None
    return float("inf") if step is None else step


def tensor_bytes(value: Any) -> int:
    """What the tensors of a state take, in memory as on disk."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


class _Snapshot:
    """A copy of a state in the CPU's memory, which no later step changes; pinned where the state is on a GPU.

    Its memory is allocated once and taken again: a thousand pinned tensors take a second.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.is_best = False
        self._copied: torch.cuda.Event | None = None

    def take(self, state: dict[str, Any], is_best: bool) -> "_Snapshot":
        """Copies from a GPU are queued behind the step that made the state and are not waited for here."""
        self.state, self.is_best = _to_cpu(state, self.state), is_best
        if any(tensor.is_cuda for tensor in state["model"].values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self

    def wait(self) -> None:
        """Until the copies have been made."""
        if self._copied is not None:
            self._copied.synchronize()


def _to_cpu(value: Any, spare: Any) -> Any:
    """A copy, as far as it goes in the memory of an earlier one."""
    if isinstance(value, Tensor):
        is_alike = isinstance(spare, Tensor) and (spare.shape, spare.dtype) == (value.shape, value.dtype)
        if not is_alike or spare.stride() != value.stride():
            spare = torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=value.is_cuda)
        return spare.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        spares = spare if isinstance(spare, dict) else {}
        return {key: _to_cpu(item, spares.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        old = [*spare] if isinstance(spare, list | tuple) else []
        old += [None] * (len(value) - len(old))
        return type(value)(_to_cpu(item, before) for item, before in zip(value, old, strict=False))
    return value


def _check_finite(state: dict[str, Any]) -> None:
    """A state that cannot be trained on must not replace one that can."""
    for name, tensor in state["model"].items():
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"the weights are not finite ({name})")

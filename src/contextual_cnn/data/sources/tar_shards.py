"""Webdataset tar shards, ROOT/train/*.tar and ROOT/val/*.tar, read in any order like files."""

import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from contextual_cnn.data.sources.class_names import check_no_class_is_empty, number_classes, read_class_names
from contextual_cnn.data.sources.names import Indices, Names, compact
from contextual_cnn.data.sources.shard_index import read_shard_index
from contextual_cnn.data.sources.source import ImageSource
from contextual_cnn.errors import UserError
from contextual_cnn.launcher import is_main_process
from contextual_cnn.text import printable

_WORTH_A_WORD = 64  # shards, whose indices take a moment
_INDEX_READERS = 2  # more wait for Python's lock rather than for the disk, and leave their memory in pieces


def shards_of(root: Path, split: str) -> list[Path]:
    """The shards of a split in sorted order; none where there is no such folder."""
    return sorted(path for path in (root / split).glob("*.tar") if not path.name.startswith("."))


def open_tar_shards(root: Path, split: str, classes: tuple[str, ...] | None = None) -> "TarShards":
    """Reads the indices of a split's shards.

    Args:
        classes: the classes that the .cls members refer to; None takes classes.txt, or numbers.

    Raises:
        UserError: naming the shard.
    """
    shards = shards_of(root, split)
    if not shards:
        raise UserError(
            f"data.root: there are no shards {root / split}/*.tar", "set data.root=ROOT of ROOT/train/*.tar"
        )
    names = read_class_names(root, classes)
    if len(shards) >= _WORTH_A_WORD and is_main_process():
        print(f"reading the indices of {len(shards)} shards in {root / split}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(_INDEX_READERS) as pool:
        indices = list(pool.map(read_shard_index, shards))
    targets = np.concatenate([index.targets for index in indices])
    for shard, index in zip(shards, indices, strict=True):
        if names is not None and index.targets.max() >= len(names):
            raise UserError(
                f"{shard} holds class {index.targets.max()}, but there are {len(names)} classes, 0 to {len(names) - 1}",
                f"correct {root / 'classes.txt'}",
            )
    names = names if names is not None else number_classes(targets, root / split)
    if classes is None:
        check_no_class_is_empty(names, targets, root / split)
    return TarShards(
        root,
        names,
        targets,
        files=_OpenFiles([str(shard) for shard in shards]),
        shard_of=np.repeat(compact(np.arange(len(shards))), [len(index.names) for index in indices]),
        offsets=compact(np.concatenate([index.offsets for index in indices])),
        sizes=compact(np.concatenate([index.sizes for index in indices])),
        members=Names.joined([index.names for index in indices]),
    )


class TarShards(ImageSource):
    """Images in tars. files: the tars; shard_of, offsets, sizes (N,) and members: where an image is in which."""

    def __init__(
        self,
        root: Path,
        classes: tuple[str, ...],
        targets: np.ndarray,
        *,
        files: "_OpenFiles",
        shard_of: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        members: Names,
    ) -> None:
        self.root, self.classes, self.targets = root, classes, targets
        self.shard_of = shard_of
        self._files, self._offsets, self._sizes, self._members = files, offsets, sizes, members
        self._shards = [printable(os.path.relpath(path, root)) for path in files.paths]
        self.shard_sizes = np.bincount(shard_of, minlength=len(files.paths))

    def name(self, index: int) -> str:
        return f"{self._shards[self.shard_of[index]]}:{self._members[index]}"

    def read(self, index: int) -> bytes:
        size = int(self._sizes[index])
        data = self._files.read(int(self.shard_of[index]), size, int(self._offsets[index]))
        if len(data) < size:
            raise OSError(f"the shard ends {size - len(data)} bytes too early")
        return data

    def arrays(self) -> dict[str, np.ndarray]:
        places = {"shard_of": self.shard_of, "offsets": self._offsets, "sizes": self._sizes}
        return {"targets": self.targets, "names": self._members.data, "ends": self._members.ends} | places

    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> "TarShards":
        places = {name: arrays[name] for name in ("shard_of", "offsets", "sizes")}
        members = Names(arrays["names"], arrays["ends"])
        return TarShards(self.root, self.classes, arrays["targets"], files=self._files, members=members, **places)

    def take(self, indices: Indices) -> "TarShards":
        kept = np.asarray(indices, dtype=np.int64)
        members = self._members.take(kept)
        columns = {"targets": self.targets, "shard_of": self.shard_of, "offsets": self._offsets, "sizes": self._sizes}
        taken = {name: column[kept] for name, column in columns.items()}
        return self.with_arrays(taken | {"names": members.data, "ends": members.ends})


class _OpenFiles:
    """Files that stay open, because opening one costs a round trip on a network file system.

    As many as half of what the process may open; then the one that was read longest ago is closed. A file is closed by
    whoever drops it last, so never under a thread that reads from it.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self._room = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()

    def __reduce__(self) -> tuple:
        return _OpenFiles, (self.paths,)

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes; pread has no position that threads would share."""
        file = self._file(number)
        return os.pread(file.descriptor, size, offset)

    def _file(self, number: int) -> "_OpenFile":
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = _OpenFile(self.paths[number])
            self._open.move_to_end(number)
            if len(self._open) > self._room:
                self._open.popitem(last=False)
            return file


class _OpenFile:
    """A descriptor for reading, as long as anybody has it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # not where it could not be opened
            os.close(self.descriptor)

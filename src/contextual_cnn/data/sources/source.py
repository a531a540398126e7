"""What every source of images offers, so that one sampler, one reader and one check serve them all."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from contextual_cnn.data.sources.names import Indices, Names
from contextual_cnn.data.sources.shared_arrays import SharedArrays
from contextual_cnn.text import printable


class ImageSource(ABC):
    """The encoded images of one split, in a fixed order and readable in any other.

    Threads may read from it at once; a copy sent to another process reads too.

    Attributes:
        classes: the names of the classes.
        targets: (N,) int64, the position of an image's class in `classes`.
        not_read: how many files lie among the images and are left out, by kind (".heic": 5).
        shard_sizes: images in each shard; None where there are none.
    """

    classes: tuple[str, ...]
    targets: np.ndarray
    not_read: Counter[str] = Counter()  # noqa: RUF012 - nobody changes it
    shard_sizes: np.ndarray | None = None
    _block: SharedArrays | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages, tables and exclude lists call an image: its path below the root, printable (`text.printable`);
        `:` and a member for an archive.
        """

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """All of it that grows with the number of images."""

    @abstractmethod
    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """The same source with other arrays of the same names."""

    def shared(self) -> Self:
        """The same source, held once by all processes of this machine that it is sent to. Raises OSError."""
        block = SharedArrays.of(self.arrays())
        source = self.with_arrays(block)
        object.__setattr__(source, "_block", block)
        return source

    def __reduce__(self) -> str | tuple[Any, ...]:
        if self._block is None:
            return super().__reduce__()
        rest = self.with_arrays({name: array[:0] for name, array in self.arrays().items()})
        return _attached, (rest, self._block)

    @abstractmethod
    def take(self, indices: Indices) -> "ImageSource":
        """The same source with these images only, in this order."""


def _attached(rest: ImageSource, block: SharedArrays) -> ImageSource:
    source = rest.with_arrays(block)
    object.__setattr__(source, "_block", block)
    return source


class ImageFiles(ImageSource):
    """Images that are files. paths: relative to root, with forward slashes, as the disk has them."""

    def __init__(
        self,
        root: Path,
        classes: tuple[str, ...],
        paths: Sequence[str],
        targets: np.ndarray,
        not_read: Counter[str] | None = None,
    ) -> None:
        self.root, self.classes, self.targets = root, classes, targets
        self.paths = paths if isinstance(paths, Names) else Names.of(paths)
        self.not_read = not_read or Counter()

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def read(self, index: int) -> bytes:
        with open(f"{self.root}/{self.paths[index]}", "rb", buffering=0) as file:
            return file.readall()

    def arrays(self) -> dict[str, np.ndarray]:
        return {"targets": self.targets, "names": self.paths.data, "ends": self.paths.ends}

    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> "ImageFiles":
        paths = Names(arrays["names"], arrays["ends"])
        return ImageFiles(self.root, self.classes, paths, arrays["targets"], self.not_read)

    def take(self, indices: Indices) -> "ImageFiles":
        targets = self.targets[np.asarray(indices, dtype=np.int64)]
        return ImageFiles(self.root, self.classes, self.paths.take(indices), targets, self.not_read)

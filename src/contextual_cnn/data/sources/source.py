"""What every source of images offers, so that one sampler, one reader and one check serve them all."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from contextual_cnn.text import printable

Indices = Sequence[int] | np.ndarray


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
    def take(self, indices: Indices) -> "ImageSource":
        """The same source with these images only, in this order."""


@dataclass(frozen=True)
class ImageFiles(ImageSource):
    """Images that are files. paths: relative to root, with forward slashes, as the disk has them."""

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    targets: np.ndarray
    not_read: Counter[str] = field(default_factory=Counter)

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def read(self, index: int) -> bytes:
        with open(f"{self.root}/{self.paths[index]}", "rb", buffering=0) as file:
            return file.readall()

    def take(self, indices: Indices) -> "ImageFiles":
        paths = tuple(self.paths[index] for index in indices)
        targets = self.targets[np.asarray(indices, dtype=np.int64)]
        return ImageFiles(self.root, self.classes, paths, targets, self.not_read)

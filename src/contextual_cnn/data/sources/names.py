"""Millions of names without an object for each."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np

Indices = Sequence[int] | np.ndarray


def compact(numbers: np.ndarray) -> np.ndarray:
    """Integers from 0 on, in the smallest type that holds them."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


class Names(Sequence[str]):
    """Texts that lie one after the other in one block of bytes.

    data: (bytes,) uint8, UTF-8; what was no UTF-8 on the disk comes back as it was. ends: (N,) where each ends.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends
        self._view = memoryview(data.data)  # whose slices are cheaper than an array's

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Names":
        return cls.of_bytes([text.encode("utf-8", "surrogateescape") for text in texts])

    @classmethod
    def of_bytes(cls, encoded: list[bytes]) -> "Names":
        ends = np.fromiter(accumulate(map(len, encoded)), dtype=np.int64, count=len(encoded))
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), compact(ends))

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> "Names":
        """One after the other."""
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        ends = [part.ends.astype(np.int64) + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.data for part in parts]), compact(np.concatenate(ends)))

    def __reduce__(self) -> tuple:
        return Names, (self.data, self.ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]  # negative ones, and an IndexError
        start = self.ends[index - 1] if index else 0
        return str(self._view[start : self.ends[index]], "utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield str(self._view[start:end], "utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment] # it is as long as a list

    def take(self, indices: Indices) -> "Names":
        """These, in this order."""
        return Names.of(self[int(index)] for index in indices)

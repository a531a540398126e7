"""Arrays that all processes of a machine hold once: in memory that has no name and goes with its last holder."""

import contextlib
import ctypes
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping

import numpy as np

_ALIGNMENT = 64
_TOKEN = 16  # bytes at the beginning, by which a process knows that it has found the right memory


class SharedArrays(Mapping[str, np.ndarray]):
    """Arrays by name, which cannot be written to. Sent to another process, it is mapped there and not copied.

    Args:
        place: process and descriptor of the memory. token: its first bytes.
        layout: name, type, shape and offset of each array.

    Raises:
        OSError: the process has ended, or its memory is another one.
    """

    def __init__(
        self, place: tuple[int, int], token: bytes, layout: tuple[tuple[str, str, tuple[int, ...], int], ...]
    ) -> None:
        self._token, self._layout = token, layout
        pid, descriptor = place
        if pid == os.getpid():
            self._descriptor = descriptor
        else:
            self._descriptor = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        if os.pread(self._descriptor, _TOKEN, 0) != token:
            raise OSError(f"descriptor {descriptor} of process {pid} is not the memory that it was")
        memory = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        self._arrays = {
            name: np.frombuffer(memory, np.dtype(kind), count=int(np.prod(shape)), offset=offset).reshape(shape)
            for name, kind, shape, offset in layout
        }

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "SharedArrays":
        """Copies of arrays. Raises OSError where there is no room."""
        layout, size = [], _TOKEN
        for name, array in arrays.items():
            offset = -(-size // _ALIGNMENT) * _ALIGNMENT
            layout.append((name, array.dtype.str, array.shape, offset))
            size = offset + array.nbytes
        token, descriptor = secrets.token_bytes(_TOKEN), os.memfd_create("contextual-cnn listing")
        os.truncate(descriptor, size)
        os.posix_fallocate(descriptor, 0, size)  # or a full memory would be a SIGBUS later
        os.pwrite(descriptor, token, 0)
        for (_, _, _, offset), array in zip(layout, arrays.values(), strict=True):
            _write(descriptor, np.ascontiguousarray(array).data.cast("B") if array.size else b"", offset)
        return cls((os.getpid(), descriptor), token, tuple(layout))

    def __reduce__(self) -> tuple:
        return SharedArrays, ((os.getpid(), self._descriptor), self._token, self._layout)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def give_memory_back() -> None:
    """What a listing's millions of texts took, and the C library keeps for later: about 50 MiB of ImageNet's."""
    with contextlib.suppress(AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def _write(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """All of it: one call writes 2 GiB at most."""
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written

"""The encoded bytes of batch after batch: a batch's images read at once, the next batch's while this one is decoded."""

import errno
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from contextual_cnn.data.bad_images import BadImage
from contextual_cnn.data.image_check import check_header, reason_of
from contextual_cnn.data.sources import ImageSource

_READERS = 8  # reads at once: what hides the latency of a network file system; they cost nothing where there is none
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENETDOWN, errno.EHOSTUNREACH}
_WAITS = (0.2, 1.0, 5.0)  # seconds before a storage that does not answer is asked again

Place = TypeVar("Place")
Read = TypeVar("Read")


class BatchReader(Generic[Place, Read]):
    """Reads numbered batches, to be asked for one after the other; an image that fails fails with its batch.

    Args:
        places: a batch's number -> what is to be read for it; any number from 0 on.
        read: (number, place within the batch, what is to be read there) -> what is handed over.
    """

    def __init__(self, places: Callable[[int], Iterable[Place]], read: Callable[[int, int, Place], Read]) -> None:
        self._places, self._read = places, read
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self._started: dict[int, list[Future]] = {}

    def __getitem__(self, number: int) -> list[Read]:
        for wanted in (number, number + 1):
            if wanted not in self._started:
                self._started[wanted] = [
                    self._pool.submit(self._read, wanted, i, place) for i, place in enumerate(self._places(wanted))
                ]
        return [image.result() for image in self._started.pop(number)]

    def forget(self) -> None:
        """Drops what has been read ahead."""
        self._started.clear()


def read_image(source: ImageSource, index: int) -> bytes:
    """One encoded image that may be expected to decode.

    Raises:
        BadImage: it cannot be read, or its first and last bytes tell that it cannot be decoded.
    """
    try:
        encoded = read_patiently(source, index)
        check_header(encoded)
    except Exception as error:  # PIL raises anything about a header
        raise BadImage(source.name(index), reason_of(error)) from error
    return encoded


def read_patiently(source: ImageSource, index: int) -> bytes:
    """A whole file, asked for again where its storage does not answer. Raises OSError."""
    for wait in _WAITS:
        try:
            return source.read(index)
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
        time.sleep(wait)
    return source.read(index)

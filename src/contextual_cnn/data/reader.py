"""The encoded bytes of batch after batch: a batch's images read at once, the next batch's while this one is decoded."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from contextual_cnn.data.sources import ImageSource
from contextual_cnn.errors import UserError

_READERS = 8  # reads at once: what hides the latency of a network file system; they cost nothing where there is none


class BatchReader:
    """Reads numbered batches of a source, to be asked for one after the other.

    Args:
        indices_of: a batch's number -> the indices of its images; any number from 0 on.
    """

    def __init__(self, source: ImageSource, indices_of: Callable[[int], np.ndarray]) -> None:
        self._source, self._indices_of = source, indices_of
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self._started: dict[int, list[Future]] = {}

    def __getitem__(self, number: int) -> list[np.ndarray]:
        """The batch's images, (bytes,) uint8 each. Raises UserError naming an image that cannot be read."""
        for wanted in (number, number + 1):
            if wanted not in self._started:
                self._started[wanted] = [
                    self._pool.submit(read_image, self._source, index) for index in self._indices_of(wanted)
                ]
        return [np.frombuffer(image.result(), np.uint8) for image in self._started.pop(number)]


def read_image(source: ImageSource, index: int) -> bytes:
    """One encoded image. What is to happen where an image cannot be read is decided here.

    Raises:
        UserError: naming the image.
    """
    try:
        encoded = source.read(index)
    except OSError as error:
        raise unreadable(source.name(index), error.strerror or str(error)) from error
    if not encoded:
        raise unreadable(source.name(index), "it is empty")
    return encoded


def unreadable(name: str, reason: str) -> UserError:
    return UserError(
        f"the image {name} cannot be read: {reason}",
        "restore it; or list it in a file for data.exclude (scripts/check_data.py ROOT --write-exclude FILE)",
    )

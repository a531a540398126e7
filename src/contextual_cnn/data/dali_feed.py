"""What feeds a DALI pipeline, and its batches, which outlive the images that DALI cannot decode.

A pipeline that meets such an image is of no more use, and does not say which one it was: DALI has no policy for it. So
the images that it had been given are tried one by one, and it is built again from the batch that it owes. Those that
failed are suspects, tried each time before they are handed over. Good images cost nothing, and as every batch is
a function of its number, the batches are those of a pipeline that never failed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from contextual_cnn.contracts import Batch
from contextual_cnn.data.bad_images import COUNTS_AS_WRONG, BadImage, BadImages, first_usable
from contextual_cnn.data.image_check import image_kinds, reason_of
from contextual_cnn.data.reader import BatchReader, read_image
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.data.transfer import to_device


class Feed(ABC):
    """Numbered batches of encoded images and their targets, and the pipeline that makes tensors of them.

    Attributes:
        blank: what takes the place of an image if none of the candidates can be used; None makes that an error.
    """

    blank: np.ndarray | None = None

    def __init__(self, images: ImageSource, bad: BadImages) -> None:
        self.images, self._bad = images, bad
        self._suspects: set[int] = set()
        self._reader = BatchReader(self.indices, self._read)
        self._taken: dict[int, list[tuple[int | None, np.ndarray]]] = {}  # handed over, not delivered

    @abstractmethod
    def indices(self, number: int) -> np.ndarray:
        """The images that belong to a batch."""

    @abstractmethod
    def candidates(self, number: int, i: int) -> Iterable[int]:
        """The image that belongs to a place in a batch, then those that may stand in for it."""

    @abstractmethod
    def decodes(self, encoded: list[np.ndarray], number: int, places: Sequence[int]) -> bool:
        """Whether DALI decodes all of these images at their places in a batch."""

    @abstractmethod
    def pipeline(self, first: int) -> Any:
        """The pipeline that begins with a batch."""

    def encoded(self, number: int) -> tuple[list[np.ndarray], np.ndarray]:
        """(bytes,) uint8 of each image, and (B,) int64 targets; the numbers rise one by one."""
        self._taken[number] = taken = self._reader[number]
        targets = [COUNTS_AS_WRONG if index is None else self.images.targets[index] for index, _ in taken]
        return [encoded for _, encoded in taken], np.array(targets, dtype=np.int64)

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """Endless batches on the device."""
        number = 0
        while True:
            try:
                for images, targets in _iterate(self.pipeline(number), device):
                    number += 1
                    yield Batch(images, targets, self._deliver(number - 1))
            except RuntimeError:
                if not self._find_suspects():
                    raise

    def _deliver(self, number: int) -> int:
        """Called when a batch has come out of the pipeline; how many of its images are not those that belong there."""
        wanted = self.indices(number).tolist()
        return sum(index != belongs for (index, _), belongs in zip(self._taken.pop(number), wanted, strict=True))

    def _find_suspects(self) -> bool:
        """Tries what was handed over and not delivered, and takes it back; whether anything new does not decode."""
        known = len(self._suspects)
        for number, taken in self._taken.items():
            if not self.decodes([encoded for _, encoded in taken], number, range(len(taken))):
                self._suspects |= {
                    index
                    for i, (index, encoded) in enumerate(taken)
                    if index is not None and not self.decodes([encoded], number, [i])
                }
        self._taken.clear()
        self._reader.forget()
        return len(self._suspects) > known

    def _read(self, number: int, i: int, _: int) -> tuple[int | None, np.ndarray]:
        use = partial(self._read_one, number, i)
        return first_usable(self.candidates(number, i), use, self._bad.report, self.blank)

    def _read_one(self, number: int, i: int, index: int) -> np.ndarray:
        encoded = read_image(self.images, index)
        as_array = np.frombuffer(encoded, np.uint8)
        if index in self._suspects and not self.decodes([as_array], number, [i]):
            name = self.images.name(index)
            raise BadImage(name, _why_not(encoded, name))
        return as_array


def _iterate(pipeline: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The sources never stop, so DALI's own epoch arithmetic plays no part."""
    iterator = DALIGenericIterator(
        [pipeline], ["images", "targets"], size=-1, auto_reset=False, prepare_first_batch=False
    )
    for (output,) in iterator:
        images: Tensor = output["images"].permute(0, 3, 1, 2)
        targets = to_device(output["targets"].view(-1), device)
        yield images, targets


def _why_not(encoded: bytes, name: str) -> str:
    """PIL says more than DALI."""
    try:
        image_kinds(encoded, name)
    except Exception as error:  # a decoder raises anything from OSError to struct.error
        return reason_of(error)
    return "DALI does not decode it"

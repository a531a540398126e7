"""What feeds a DALI pipeline, and its batches, which outlive the images that DALI cannot decode.

A pipeline that meets such an image is of no more use, and does not say which one it was: DALI has no policy for it. So
the images that it had been given are tried one by one, and it is built again from the batch that it owes. Those that
failed are suspects, tried each time before they are handed over. Good images cost nothing, and as every batch is
a function of its number, the batches are those of a pipeline that never failed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from contextual_cnn.contracts import Batch
from contextual_cnn.data.bad_images import COUNTS_AS_WRONG, BadImage
from contextual_cnn.data.image_check import describe, image_kinds
from contextual_cnn.data.reader import BatchReader, read_image
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.data.transfer import to_device


class Feed:
    """Numbered batches of encoded images and their targets.

    Args:
        indices_of: a batch's number -> the images that belong there.
        fill: (number, place in the batch, use) -> the image that is taken, None for a blank, and what `use` makes of
            it. `use` raises BadImage.
        decodes: (encoded images, number, their places in the batch) -> whether DALI decodes them, all of them.
    """

    def __init__(
        self,
        images: ImageSource,
        *,
        indices_of: Callable[[int], np.ndarray],
        fill: Callable[[int, int, Callable[[int], np.ndarray]], tuple[int | None, np.ndarray]],
        decodes: Callable[[list[np.ndarray], int, Sequence[int]], bool],
    ) -> None:
        self._images, self._fill, self._decodes = images, fill, decodes
        self._indices_of = indices_of
        self._suspects: set[int] = set()
        self._reader = BatchReader(indices_of, self._read)
        self._taken: dict[int, list[tuple[int | None, np.ndarray]]] = {}  # handed over, not delivered

    def __getitem__(self, number: int) -> tuple[list[np.ndarray], np.ndarray]:
        """(bytes,) uint8 of each image, and (B,) int64 targets; the numbers rise one by one."""
        self._taken[number] = taken = self._reader[number]
        targets = [COUNTS_AS_WRONG if index is None else self._images.targets[index] for index, _ in taken]
        return [encoded for _, encoded in taken], np.array(targets, dtype=np.int64)

    def deliver(self, number: int) -> int:
        """Called when a batch has come out of the pipeline; how many of its images are not those that belong there."""
        wanted = self._indices_of(number).tolist()
        return sum(index != belongs for (index, _), belongs in zip(self._taken.pop(number), wanted, strict=True))

    def find_suspects(self) -> bool:
        """Tries what was handed over and not delivered, and takes it back; whether anything new does not decode."""
        known = len(self._suspects)
        for number, taken in self._taken.items():
            if not self._decodes([encoded for _, encoded in taken], number, range(len(taken))):
                self._suspects |= {
                    index
                    for i, (index, encoded) in enumerate(taken)
                    if index is not None and not self._decodes([encoded], number, [i])
                }
        self._taken.clear()
        self._reader.forget()
        return len(self._suspects) > known

    def _read(self, number: int, i: int, _: int) -> tuple[int | None, np.ndarray]:
        return self._fill(number, i, partial(self._use, number, i))

    def _use(self, number: int, i: int, index: int) -> np.ndarray:
        encoded = read_image(self._images, index)
        as_array = np.frombuffer(encoded, np.uint8)
        if index in self._suspects and not self._decodes([as_array], number, [i]):
            name = self._images.name(index)
            raise BadImage(name, _why_not(encoded, name))
        return as_array


def batches(feed: Feed, build: Callable[[int], Any], device: torch.device) -> Iterator[tuple[Batch, int]]:
    """Endless batches on the device, and of each how many of its images are not those that belong there.

    Args:
        build: makes the pipeline that begins with a batch.
    """
    number = 0
    while True:
        try:
            for batch in _iterate(build(number), device):
                number += 1
                yield batch, feed.deliver(number - 1)
        except RuntimeError:
            if not feed.find_suspects():
                raise


def _iterate(pipeline: Any, device: torch.device) -> Iterator[Batch]:
    """The sources never stop, so DALI's own epoch arithmetic plays no part."""
    iterator = DALIGenericIterator(
        [pipeline], ["images", "targets"], size=-1, auto_reset=False, prepare_first_batch=False
    )
    for (output,) in iterator:
        images: Tensor = output["images"].permute(0, 3, 1, 2)
        targets = to_device(output["targets"].view(-1), device)
        yield Batch(images, targets)


def _why_not(encoded: bytes, name: str) -> str:
    """PIL says more than DALI."""
    try:
        image_kinds(encoded, name)
    except Exception as error:  # a decoder raises anything from OSError to struct.error
        return describe(error)
    return "DALI does not decode it"

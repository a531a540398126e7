"""Every random number of a run is a function of the seed and of a position, never of what was drawn before.

So nothing has to be saved to resume a run exactly, and the number of processes, threads or workers changes no draw:

* what happens to one image in the loader depends on (seed, epoch, place of the image in the epoch): `uniform_rows`;
* what happens to it on the device (mixing, erasing, dropped paths) on (seed, step, place in the global batch):
  `Places`;
* what a library draws beyond that (dropout) on (seed, number of the micro-batch): `seed_all`.
"""

import random
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

# How a run draws; a checkpoint holds it. 1: mixing, erasing and dropped paths by micro-batch, until November 2026
DRAWS = 2

_WORDS_PER_COUNT = 4  # one increment of Philox's counter yields four 64-bit words, one word a double


class Purpose(IntEnum):
    """What numbers are drawn for: first part of every key, so that no two purposes share a stream."""

    INITIAL_WEIGHTS = 1
    EPOCH_ORDER = 2
    IMAGE = 3
    MICRO_BATCH = 4
    IMAGE_OPS = 5
    SUBSTITUTE = 6
    SYNTHETIC = 7
    MIXING = 8
    ERASING = 9
    DROP_PATH = 10
    CONTROL = 11
    CLIP = 12
    SCENE = 13


def generator(purpose: Purpose, *key: int) -> np.random.Generator:
    """A numpy generator that depends on the key alone."""
    return np.random.Generator(_philox(purpose, *key))


def uniform_rows(purpose: Purpose, *key: int, start: int, rows: int, columns: int) -> np.ndarray:
    """Rows `start` to `start + rows` of an endless table of uniform [0, 1) numbers; the rows before are not made.

    Args:
        key: which table.
        columns: the table's width, a multiple of 4; another width is another table.

    Returns:
        (rows, columns) float64.
    """
    if columns % _WORDS_PER_COUNT:
        raise ValueError(f"columns must be a multiple of {_WORDS_PER_COUNT}, got {columns}")
    philox = _philox(purpose, *key)
    philox.advance(start * columns // _WORDS_PER_COUNT)
    return np.random.Generator(philox).random((rows, columns))


@dataclass(frozen=True)
class Places:
    """Places of a step's global batch that follow one another, by which all is drawn that happens on the device.

    first: counted from 0 in the global batch. count: samples of a micro-batch.
    """

    seed: int
    step: int
    first: int
    count: int

    def uniform(self, purpose: Purpose, columns: int) -> np.ndarray:
        """(count, columns) float64 of [0, 1); columns is a multiple of 4."""
        return uniform_rows(purpose, self.seed, self.step, start=self.first, rows=self.count, columns=columns)


def seed_numpy(purpose: Purpose, *key: int) -> None:
    """Sets the legacy generator, from which timm's Mixup draws."""
    np.random.seed(np.random.SeedSequence((purpose, *key)).generate_state(1, np.uint32))  # noqa: NPY002


def seed_all(purpose: Purpose, *key: int) -> None:
    """Sets the generators that libraries draw from: Python's (timm's erasing), numpy's (timm's Mixup), torch's."""
    import torch  # here: what draws by numpy alone does not wait for it

    words = np.random.SeedSequence((purpose, *key)).generate_state(2, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))  # noqa: NPY002 - timm's Mixup draws from the legacy generator
    torch.manual_seed(int(words[1]))


def _philox(*key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(key))

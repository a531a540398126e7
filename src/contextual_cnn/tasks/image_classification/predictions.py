"""The five best classes of every image of a split, from all ranks, in the order of the listing."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from contextual_cnn.contracts import is_considered
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.distributed import World, all_reduce_sum
from contextual_cnn.errors import UserError
from contextual_cnn.runs.csv_file import write_csv

_BEST = 5


class Predictions(NamedTuple):
    """classes: (N, k) int64, best first. probabilities: (N, k) float64, of the softmax. On the CPU.

    An image that cannot be used has the classes -1, which no target is, with probability 0.
    """

    classes: Tensor
    probabilities: Tensor


class PredictionTable:
    """Filled batch by batch with this rank's share, the images r, r + R, ... of the listing (see data/sampler.py).

    Args:
        images: of the whole split.
        classes: that a prediction is made among; fewer than five are all listed.
    """

    def __init__(self, images: int, classes: int, world: World) -> None:
        self._world, self._best = world, min(_BEST, classes)
        # float64 holds the class numbers exactly, so that one all-reduce brings both
        self._rows = torch.zeros(images, 2 * self._best, dtype=torch.float64, device=world.device)
        self._seen = 0

    def add(self, targets: Tensor, logits: Tensor) -> None:
        """The next batch.

        Args:
            targets: (B,), below 0 for an image that cannot be used.
            logits: (B, N), the final ones; -inf is a class that is not considered.
        """
        best = logits.topk(self._best, dim=1)
        probabilities = logits.float().softmax(dim=1).gather(1, best.indices)
        # Where no class is left there is no confidence either; a NaN of the model stays one
        probabilities = probabilities.where(is_considered(logits).any(dim=1, keepdim=True), 0.0)
        own = torch.arange(self._seen, self._seen + len(logits), device=logits.device)
        rows = torch.cat([best.indices.double(), probabilities.double()], dim=1)
        unusable = torch.tensor([-1.0] * self._best + [0.0] * self._best, dtype=rows.dtype, device=rows.device)
        rows = torch.where((targets < 0).unsqueeze(1), unusable, rows)
        self._rows[self._world.rank + self._world.size * own] = rows
        self._seen += len(logits)

    def gather(self) -> Predictions:
        """The whole table; called by all ranks once. The others' rows are zero here, so a sum puts them together."""
        classes, probabilities = all_reduce_sum(self._rows).cpu().split(self._best, dim=1)
        return Predictions(classes.long(), probabilities)


def write_predictions(path: Path, predictions: Predictions, source: ImageSource) -> None:
    """A CSV line for each image: name, target, and the best classes with their probabilities.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_csv(path, _rows(predictions, source))
    except OSError as error:
        raise UserError(f"predictions: {path} cannot be written: {error}", "predictions=FILE") from error


def _rows(predictions: Predictions, source: ImageSource) -> Iterator[Sequence[str]]:
    best = range(1, predictions.classes.shape[1] + 1)
    yield ["name", "target", *(column for i in best for column in (f"class{i}", f"probability{i}"))]
    both = zip(predictions.classes.tolist(), predictions.probabilities.tolist(), strict=True)
    for index, (classes, probabilities) in enumerate(both):
        pairs = zip(classes, probabilities, strict=True)
        named = [text for c, p in pairs for text in (source.classes[c] if c >= 0 else "", f"{p:.6f}")]
        yield [source.name(index), source.classes[source.targets[index]], *named]

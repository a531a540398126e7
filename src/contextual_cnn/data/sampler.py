"""Which image goes where: pure arithmetic from (seed, step, rank) to indices. No state, so nothing to resume.

An epoch is one permutation of the images, cut into global batches; the rest of less than a batch is left out,
another rest in every epoch. (With repeats, an epoch is as long and shows fewer images, each several times.)
A global batch is cut into micro-batches, numbered over the whole run:

    global batch of step s = micro-batches s*A*R .. (s+1)*A*R - 1        A accumulation, R ranks
    rank r computes the micro-batches (s*A + a)*R + r                    a = 0 .. A-1

So one process with A = 4 and four with A = 1 see the same micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain

import numpy as np

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.randomness import Purpose, generator


@dataclass(frozen=True)
class MicroBatch:
    """Images `start` to `start + len(indices)` of an epoch's permutation."""

    epoch: int
    start: int
    indices: np.ndarray


class TrainSampler:
    """The endless sequence of one rank's micro-batches, readable from any step.

    Args:
        first_step: where the sequence begins.
        repeats: how often an epoch shows an image.
        shards: how an epoch is shuffled where the images lie in shards; None shuffles it as a whole.
        alike: which images are to follow one another, besides.
    """

    def __init__(
        self,
        plan: BatchPlan,
        seed: int,
        rank: int,
        first_step: int = 0,
        *,
        repeats: int = 1,
        shards: "ShardWindows | None" = None,
        alike: "AlikeGroups | None" = None,
    ) -> None:
        self.plan, self.seed, self.rank, self.first_step = plan, seed, rank, first_step
        self._repeats, self._shards, self._alike = repeats, shards, alike
        self._order = lru_cache(maxsize=2)(self._make_order)  # reading ahead looks into the next epoch
        self._batch = lru_cache(maxsize=4)(self._make_batch)  # asked for again for each of its images

    def __reduce__(self) -> tuple:
        """For worker processes: a cache cannot be sent, and need not be."""
        make = partial(TrainSampler, repeats=self._repeats, shards=self._shards, alike=self._alike)
        return make, (self.plan, self.seed, self.rank, self.first_step)

    def __getitem__(self, n: int) -> MicroBatch:
        """The n-th micro-batch of this rank since `first_step`."""
        return self._batch(n)

    def _make_batch(self, n: int) -> MicroBatch:
        plan = self.plan
        step, accumulated = self.first_step + n // plan.accumulation, n % plan.accumulation
        epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
        start = plan.micro_batch_number(step_in_epoch, accumulated, self.rank) * plan.micro_batch
        return MicroBatch(epoch, start, self._order(epoch)[start : start + plan.micro_batch])

    def candidates(self, n: int, i: int) -> Iterator[int]:
        """The image of the i-th place of the n-th micro-batch, then without end those that may stand in for it."""
        batch = self[n]
        return chain([int(batch.indices[i])], substitutes(self.seed, batch.epoch, batch.start + i, self.plan.images))

    def _make_order(self, epoch: int) -> np.ndarray:
        if self._shards is None:
            order = epoch_order(self.seed, epoch, self.plan.images)
        else:
            order = windowed_order(self.seed, epoch, self._shards)
        if self._alike is not None:
            order = grouped_order(self.seed, epoch, order, self._alike)
        order = repeat_images(order, self._repeats, self.plan.global_batch)
        order.setflags(write=False)
        return order


def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The permutation of an epoch, the same on every rank."""
    return generator(Purpose.EPOCH_ORDER, seed, epoch).permutation(images)


def substitutes(seed: int, epoch: int, place: int, images: int) -> Iterator[int]:
    """Images in random order, drawn for one place of an epoch; without end, so some come twice."""
    draws = generator(Purpose.SUBSTITUTE, seed, epoch, place)
    while True:
        yield int(draws.integers(images))


@dataclass(frozen=True)
class ShardWindows:
    """sizes: images of each shard, whose indices follow one another. at_a_time: shards that are shuffled together."""

    sizes: np.ndarray
    at_a_time: int


def windowed_order(seed: int, epoch: int, shards: ShardWindows) -> np.ndarray:
    """A permutation that is done with a few shards before it comes to the next: shards shuffled, then their images."""
    draws = generator(Purpose.EPOCH_ORDER, seed, epoch)
    ends = np.cumsum(shards.sizes)
    shuffled = draws.permutation(len(ends))
    windows = [shuffled[i : i + shards.at_a_time] for i in range(0, len(ends), shards.at_a_time)]
    return np.concatenate(
        [
            draws.permutation(np.concatenate([np.arange(ends[i] - shards.sizes[i], ends[i]) for i in window]))
            for window in windows
        ]
    )


@dataclass(frozen=True)
class AlikeGroups:
    """kind: (images,) of each image. size: images of a group, all of one kind."""

    kind: np.ndarray
    size: int


def grouped_order(seed: int, epoch: int, order: np.ndarray, alike: AlikeGroups) -> np.ndarray:
    """The same images in another order: groups of one kind, shuffled; what fills no group comes last, mixed.

    A size that divides the micro-batch, or the reverse, makes batches of one kind at any number of processes.
    """
    of_kind = alike.kind[order]
    parts = [order[of_kind == kind] for kind in np.unique(of_kind)]
    whole = [part[: len(part) // alike.size * alike.size] for part in parts]
    rest = np.concatenate([part[len(kept) :] for part, kept in zip(parts, whole, strict=True)])
    groups = np.concatenate(whole).reshape(-1, alike.size)
    shuffled = generator(Purpose.EPOCH_ORDER, seed, epoch, 1).permutation(len(groups))
    return np.concatenate([groups[shuffled].reshape(-1), rest])


def repeat_images(order: np.ndarray, repeats: int, global_batch: int) -> np.ndarray:
    """Repeated augmentation: the first images of an epoch `repeats` times each, in the same number of steps.

    As timm's RepeatAugSampler, every image is followed by its copies, which fall into one global batch (at its end,
    into two) but to different ranks. Here a global batch is laid out copy by copy instead of rank by rank, so that
    its order depends on no number of ranks: copies are about global_batch / repeats places apart, hence in different
    micro-batches unless these are larger.
    """
    if repeats == 1:
        return order
    steps = len(order) // global_batch
    followed_by_copies = np.repeat(order[: -(-len(order) // repeats)], repeats)
    batches = followed_by_copies[: steps * global_batch].reshape(steps, global_batch)
    return np.concatenate([batches[:, copy::repeats] for copy in range(repeats)], axis=1).reshape(-1)


def evaluation_batches(images: int, batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """Every image once over all ranks: rank r takes images r, r + R, ...; the last batch is as short as it is."""
    mine = np.arange(rank, images, world_size)
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]

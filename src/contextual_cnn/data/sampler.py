"""Which image goes where: pure arithmetic from (seed, step, rank) to indices. No state, so nothing to resume.

An epoch is one permutation of the images, cut into global batches; the rest of less than a batch is left out,
another rest in every epoch. A global batch is cut into micro-batches, numbered over the whole run:

    global batch of step s = micro-batches s*A*R .. (s+1)*A*R - 1        A accumulation, R ranks
    rank r computes the micro-batches (s*A + a)*R + r                    a = 0 .. A-1

So one process with A = 4 and four with A = 1 see the same micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from contextual_cnn.errors import UserError
from contextual_cnn.randomness import Purpose, generator


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is shared out, and how many of them make an epoch.

    global_batch = micro_batch * accumulation * world_size.
    """

    images: int
    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int

    @classmethod
    def make(cls, *, images: int, global_batch: int, micro_batch: int, world_size: int) -> "BatchPlan":
        """Works out the accumulation.

        Raises:
            UserError: with the arithmetic, if it does not come out even.
        """
        if global_batch < 1 or micro_batch < 1:
            raise UserError(
                f"batch sizes must be positive, got global {global_batch} and micro {micro_batch}",
                "set trainer.global_batch_size and trainer.micro_batch_size",
            )
        if global_batch % world_size:
            down, up = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
            raise UserError(
                f"trainer.global_batch_size={global_batch} cannot be shared by {world_size} processes",
                f"trainer.global_batch_size={down or up} or {up}, or another number of processes",
            )
        share = global_batch // world_size
        micro_batch = min(micro_batch, share)
        if share % micro_batch:
            down = next(m for m in range(micro_batch, 0, -1) if share % m == 0)
            up = next(m for m in range(micro_batch, share + 1) if share % m == 0)
            raise UserError(
                f"a process's share of the global batch, {global_batch} / {world_size} = {share} images, "
                f"is no multiple of trainer.micro_batch_size={micro_batch}",
                f"trainer.micro_batch_size={down} or trainer.micro_batch_size={up}",
            )
        if images < global_batch:
            raise UserError(
                f"the training split has {images} images, less than one global batch of {global_batch}",
                f"trainer.global_batch_size={max(world_size, images // 4 // world_size * world_size)} or more data",
            )
        return cls(images, global_batch, micro_batch, share // micro_batch, world_size)

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.global_batch

    @property
    def left_out(self) -> int:
        """Images that an epoch does not show, because they fill no global batch."""
        return self.images % self.global_batch

    def micro_batch_number(self, step: int, accumulated: int, rank: int) -> int:
        """The run-wide number of a micro-batch; what seeds everything that is drawn for it."""
        return (step * self.accumulation + accumulated) * self.world_size + rank

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {self.micro_batch} images x {self.accumulation} accumulated "
            f"x {self.world_size} processes; {self.steps_per_epoch} steps an epoch, {self.left_out} images left over"
        )


@dataclass(frozen=True)
class MicroBatch:
    """Images `start` to `start + len(indices)` of an epoch's permutation."""

    epoch: int
    start: int
    indices: np.ndarray


class TrainSampler:
    """The endless sequence of one rank's micro-batches, readable from any step."""

    def __init__(self, plan: BatchPlan, seed: int, rank: int, first_step: int = 0) -> None:
        self.plan, self.seed, self.rank, self.first_step = plan, seed, rank, first_step

    def __getitem__(self, n: int) -> MicroBatch:
        """The n-th micro-batch of this rank since `first_step`."""
        plan = self.plan
        step, accumulated = self.first_step + n // plan.accumulation, n % plan.accumulation
        epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
        start = plan.micro_batch_number(step_in_epoch, accumulated, self.rank) * plan.micro_batch
        order = epoch_order(self.seed, epoch, plan.images)
        return MicroBatch(epoch, start, order[start : start + plan.micro_batch])


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The permutation of an epoch, the same on every rank."""
    order = generator(Purpose.EPOCH_ORDER, seed, epoch).permutation(images)
    order.setflags(write=False)
    return order


def evaluation_batches(images: int, batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """Every image once over all ranks: rank r takes images r, r + R, ...; the last batch is as short as it is."""
    mine = np.arange(rank, images, world_size)
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]

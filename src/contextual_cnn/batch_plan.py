"""How a global batch is shared out: over micro-batches and processes, and over the statistics of batch norms."""

from dataclasses import dataclass

from contextual_cnn.errors import UserError


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
                f"trainer.global_batch_size={global_batch} and micro_batch_size={micro_batch} must be 1 or more",
                "trainer.global_batch_size=4096 trainer.micro_batch_size=128",
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
                f"is not a multiple of trainer.micro_batch_size={micro_batch}",
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

    def first_place(self, accumulated: int, rank: int) -> int:
        """Of a micro-batch in its global batch; the places of its samples follow one another."""
        return (accumulated * self.world_size + rank) * self.micro_batch

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {self.micro_batch} images x {self.accumulation} accumulated "
            f"x {self.world_size} processes; {self.steps_per_epoch} steps an epoch, {self.left_out} images left over"
        )


@dataclass(frozen=True)
class NormPlan:
    """How a global batch is shared out over the statistics of a batch norm.

    images: of a statistic. parts: statistics in a micro-batch. ranks: that follow one another and share a statistic;
    parts or ranks is 1.
    """

    images: int
    parts: int = 1
    ranks: int = 1

    @classmethod
    def make(cls, plan: BatchPlan, wanted: int) -> "NormPlan":
        """As many images in a statistic as wanted, at most the global batch; else as many as come next to that.

        Micro-batches that are too small are joined over ranks and not over time: an accumulated one has gone when
        the next one comes. Those that are too large are cut, into parts that are not smaller than wanted.
        """
        wanted, micro_batch = min(wanted, plan.global_batch), plan.micro_batch
        if micro_batch >= wanted:
            parts = next(n for n in range(micro_batch // wanted, 0, -1) if micro_batch % n == 0)
            return cls(micro_batch // parts, parts=parts)
        ranks = next(n for n in range(wanted // micro_batch, 0, -1) if plan.world_size % n == 0)
        return cls(micro_batch * ranks, ranks=ranks)

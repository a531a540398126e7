"""Memory that does not suffice, or is never given back."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError

log = logging.getLogger(__name__)

_GROWTH = 1.25
# What others than torch say when they find no memory on a GPU: DALI, the CUDA runtime and driver, cuDNN, cuBLAS
_SHORTAGES = ("CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation", "out of memory", "_ALLOC_FAILED", "bad_alloc")


@contextmanager
def explained_shortage(world: World, plan: BatchPlan, step: int) -> Iterator[None]:
    """Tells what to do where a GPU's memory does not suffice for the step after `step`, whoever ran out of it.

    Halved micro-batches, accumulated twice as often, leave the global batch as it is.

    Raises:
        UserError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _SHORTAGES):
            raise _shortage(world, plan, step) from error
        raise


def _shortage(world: World, plan: BatchPlan, step: int) -> UserError:
    return UserError(
        f"the memory of {world.device} does not suffice for {plan.micro_batch} images at once (step {step + 1})",
        f"trainer.micro_batch_size={max(1, plan.micro_batch // 2)} (the global batch stays {plan.global_batch}, "
        f"{2 * plan.accumulation} times accumulated), or model.grad_checkpointing=true",
    )


def resident_gib() -> float:
    """What this process holds of the machine's memory now."""
    with open("/proc/self/status") as file:
        kilobytes = next(line.split()[1] for line in file if line.startswith("VmRSS"))
    return int(kilobytes) / 2**20


class GrowthWatch:
    """Warns when the process's memory has grown by a quarter since the first look, and again with every further one.

    The first look belongs after everything has been allocated, such as after the first checkpoint.
    """

    def __init__(self) -> None:
        self._expected: float | None = None

    def look(self, gib: float) -> None:
        if self._expected is None:
            self._expected = gib
        elif gib > _GROWTH * self._expected:
            log.warning(
                "the process's memory has grown from %.2f to %.2f GiB; if it goes on, a run that is stopped and "
                "resumed begins with little again (trainer.max_time)",
                *(self._expected, gib),
            )
            self._expected = gib

"""The process group: who am I, how many are we, and the two collectives that the framework needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from contextual_cnn.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place. rank counts over all nodes (data), local_rank over this node (device)."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and talks to people."""
        return self.rank == 0


def is_main_process() -> bool:
    """Rank 0 by the launcher's environment; usable before there is a process group."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Number of processes by the launcher's environment; usable before there is a process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: str = "auto", timeout_minutes: float = 10) -> Iterator[World]:
    """Joins the group that torchrun describes (nccl on GPUs, gloo on CPUs); alone, there is no group to join.

    Args:
        device: "auto" (a GPU where there is one), "cuda" or "cpu".
        timeout_minutes: how long a collective waits for a rank that does not come.
    """
    rank, size = int(os.environ.get("RANK", "0")), world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    where = _device(device, local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size > 1:
        # device_id makes NCCL connect now rather than in the middle of the first step
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=where if where.type == "cuda" else None,
        )
    try:
        yield World(rank, size, local_rank, where)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "trainer.device=cuda, but torch sees no CUDA device",
            "check nvidia-smi, or use trainer.device=cpu",
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()} on this node",
            f"torchrun --nproc-per-node {torch.cuda.device_count()}",
        )
    return torch.device("cuda", local_rank)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def same_on_all_ranks(value: int) -> bool:
    """Whether every process holds the same number."""
    if not dist.is_initialized():
        return True
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    extremes = torch.tensor([value, -value], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return extremes[0].item() == -extremes[1].item()

"""The process group: who am I, how many are we, and the few collectives that the framework needs."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contextual_cnn.device import choose_device
from contextual_cnn.errors import LostProcess, UserError
from contextual_cnn.launcher import STARTED_BY, launched, world_size
from contextual_cnn.shared_failure import SharedFailure

_TORCHS_TURN = 5  # seconds by which torch's own error, which tells more, may be late


@dataclass(frozen=True)
class World:
    """This process's place. rank counts over all nodes (data), local_rank over this node (device).

    patience: how long a collective waits, in every group of ranks.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    patience: timedelta = timedelta(minutes=10)

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and talks to people."""
        return self.rank == 0


@contextmanager
def process_group(device: str = "auto", timeout_minutes: float = 10) -> Iterator[World]:
    """Joins the group that torchrun describes (nccl on GPUs, gloo on CPUs); alone, there is no group to join.

    Args:
        device: "auto" (a GPU where there is one), "cuda" or "cpu".
        timeout_minutes: how long a collective waits for a rank that does not come.

    Raises:
        LostProcess: another process ended, or did not come in time.
        UserError: there is no such device or torch cannot use it, the environment describes no group, or torchrun
            would not be able to restart the processes.
    """
    _check_restarts()
    rank, size, local_rank = launched("RANK", 0), world_size(), launched("LOCAL_RANK", 0)
    _check_place(rank, size)
    where = choose_device(device, local_rank)
    # NCCL ends the process when its time is up: after the watchdog has shown where it hangs
    patience = timedelta(minutes=timeout_minutes + (where.type == "cuda"))
    world = World(rank, size, local_rank, where, patience)
    if size == 1:
        yield world
        return
    with SharedFailure(_join(world, timeout_minutes), rank, size) as failure:
        try:
            yield world
        except RuntimeError as error:
            if not _is_about_a_peer(error):
                raise
            when = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
            why = failure.cause() or (
                f"another process of the run has ended, or did not answer within {timeout_minutes:g} min "
                f"({str(error).splitlines()[0]:.150})"
            )
            raise LostProcess(f"rank {rank}{when}: {why}") from error
    dist.destroy_process_group()  # after a failure it would wait for those that do not come


def _check_place(rank: int, size: int) -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise UserError(f"WORLD_SIZE={size}, but {' and '.join(missing)} not set in the environment", STARTED_BY)
    if rank >= size:
        raise UserError(f"RANK={rank}, but WORLD_SIZE={size}: ranks count from 0", STARTED_BY)


def _join(world: World, timeout_minutes: float) -> dist.Store:
    """The store that the processes share, once all of them are there."""
    is_cuda = world.device.type == "cuda"
    try:
        store = _meet(timedelta(minutes=timeout_minutes))
        # device_id makes NCCL connect now rather than in the middle of the first step
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=world.patience,
            device_id=world.device if is_cuda else None,
        )
    except (dist.DistError, ValueError, TimeoutError) as error:
        if "NCCL" in str(error):
            raise LostProcess(
                f"rank {world.rank}: NCCL could not start ({str(error).splitlines()[0]:.150}); "
                "export NCCL_DEBUG=INFO says why; see to /dev/shm, and to the driver with nvidia-smi"
            ) from error
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostProcess(
            f"rank {world.rank}: {world.size} processes were to meet at {place} within "
            f"{timeout_minutes:g} min, and did not ({str(error).splitlines()[0]:.150})"
        ) from error
    return store


def _meet(timeout: timedelta) -> dist.Store:
    """The store through which the processes find each other.

    In a thread, because torch waits for ever where something takes the connection and then does not answer.

    Raises:
        TimeoutError: that is so; DistError, ValueError: what torch finds itself.
    """
    meeting: Future[dist.Store] = Future()

    def meet() -> None:
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        except Exception as error:
            meeting.set_exception(error)
        else:
            meeting.set_result(dist.PrefixStore("default_pg", store))

    threading.Thread(target=meet, name="rendezvous", daemon=True).start()
    try:
        return meeting.result(timeout.total_seconds() + _TORCHS_TURN)
    except TimeoutError as error:
        raise TimeoutError("something there takes connections and does not answer: another program's port?") from error


def _check_restarts() -> None:
    """Restarted workers find the addresses of the dead ones in the agent's store: more than half never came back."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            f"torchrun --max-restarts {restarts} does not bring a run back with its default store in this torch",
            "use scripts/launch.sh with --rdzv-backend c10d --rdzv-endpoint HOST:PORT instead of --master-addr and "
            "--master-port, or export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun",
        )


def _is_about_a_peer(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors: they name its source files, or say that another collective's time was over."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo", "caused pair closure"))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_numbers(numbers: Sequence[int]) -> list[list[int]]:
    """Every rank's numbers (int64, as many on each rank), by rank."""
    if not dist.is_initialized():
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.int64, device=_collective_device())
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    return [theirs.tolist() for theirs in everyones]


def gather_on_main(value: Any) -> list[Any] | None:
    """Every rank's value, by rank, on rank 0; None on the others. The values cross as pickles of this run's own."""
    if not dist.is_initialized():
        return [value]
    everyones = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, everyones)
    return everyones


def barrier() -> None:
    """Returns when every rank has come here."""
    gather_numbers([0])


class AnyRank:
    """Whether any rank says yes, told to all of them at the same call: one call late, so that nobody waits.

    The answer to a call is fetched by the next one, a step later. By then it is there: neither the host nor the
    device has stood still for it, and the host is never more than one step ahead. A process alone is told at once.
    """

    def __init__(self) -> None:
        self._fetch: Callable[[], bool] = lambda: False

    def __call__(self, yes: bool) -> bool:
        """To be called by all ranks as often."""
        if not dist.is_initialized():
            return yes
        answer = self._fetch()
        self._fetch = _ask(yes)
        return answer


def _ask(yes: bool) -> Callable[[], bool]:
    """Starts the all-reduce; what it returns waits for the answer."""
    device = _collective_device()
    flag = torch.full((1,), float(yes), device=device)
    work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
    if device.type == "cpu":

        def fetch() -> bool:
            work.wait()
            return bool(flag)

        return fetch
    work.wait()  # of the device's stream, not of the host
    answer = flag.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def fetch_from_device() -> bool:
        arrived.synchronize()
        return bool(answer)

    return fetch_from_device


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

"""Our own collectives on the devices at hand, then what the others notice when a process is lost.

torchrun --nproc-per-node N scripts/dev/check_collectives.py
torchrun --nproc-per-node N scripts/dev/check_collectives.py --lose mistake|kill|exit|hang

A line of JSON for each check, from rank 0; with --lose, from each rank how long it took. A lost process is noticed at
once where it could say so (mistake), and after --minutes where it could not.
"""

import argparse
import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from contextual_cnn.distributed import AnyRank, World, all_reduce_sum, barrier, gather_numbers, process_group
from contextual_cnn.errors import LostProcess, UserError

GRADIENTS = 33_000_000  # numbers, of ConvNeXt-T


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    lost_at = started
    try:
        with process_group(arguments.device, arguments.minutes) as world:
            joined = time.perf_counter() - started
            say(world, check="joined", seconds=joined, device=str(world.device), processes=world.size)
            check_values(world)
            measure(world, arguments.numbers)
            if arguments.lose is not None and world.size > 1:
                lost_at = time.perf_counter()
                lose(world, arguments.lose)
    except (LostProcess, UserError) as error:
        seconds = round(time.perf_counter() - lost_at, 1)
        print(json.dumps({"check": arguments.lose, "noticed_after_s": seconds, "error": str(error)}), flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--lose", choices=("mistake", "kill", "exit", "hang"), help="how the last process is lost")
    parser.add_argument("--minutes", type=float, default=0.5, help="trainer.timeout_minutes of this check (0.5)")
    parser.add_argument("--numbers", type=int, default=GRADIENTS, help="of the large all-reduce (ConvNeXt-T's)")
    return parser.parse_args()


def check_values(world: World) -> None:
    """What is reduced and gathered arrives as it was."""
    everyones = [[rank, 2**59 + rank] for rank in range(world.size)]
    assert gather_numbers([world.rank, 2**59 + world.rank]) == everyones
    total = all_reduce_sum(torch.full((3,), 1.0 + world.rank, dtype=torch.float64, device=world.device))
    assert total.tolist() == [world.size * (world.size + 1) / 2] * 3
    any_rank = AnyRank()
    answers = [any_rank(world.rank == world.size - 1 and call == 2) for call in range(5)]
    assert answers == [call == (2 if world.size == 1 else 3) for call in range(5)]
    say(world, check="values")


def measure(world: World, numbers: int) -> None:
    """Milliseconds of the gradients' all-reduce, and of the question that is asked with every step."""
    gradients, any_rank = torch.zeros(numbers, device=world.device), AnyRank()
    for name, call, calls in (
        ("all_reduce", lambda: all_reduce_sum(gradients), 10),
        ("any_rank", lambda: any_rank(False), 200),
    ):
        for _ in range(3):
            call()
        barrier()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        barrier()
        say(world, check=name, milliseconds=1e3 * (time.perf_counter() - started) / calls)


def lose(world: World, how: str) -> None:
    """The last process is lost; the others go on as in a training, until they notice."""
    barrier()
    if world.rank == world.size - 1:
        if how == "mistake":
            raise UserError("a mistake of this process alone", "none: this is a check")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(0)
        time.sleep(3600)
    any_rank = AnyRank()
    while True:
        any_rank(False)
        time.sleep(0.1)


def say(world: World, **found: object) -> None:
    if world.is_main:
        backend = dist.get_backend() if dist.is_initialized() else None
        print(json.dumps(found | {"backend": backend}), flush=True)


if __name__ == "__main__":
    main()

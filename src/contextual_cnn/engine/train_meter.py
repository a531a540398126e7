"""The training metrics between two log steps: what was learned, how fast, and how much of the time was waiting."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from contextual_cnn.device import memory_in_use
from contextual_cnn.distributed import World
from contextual_cnn.engine.sums import Sums
from contextual_cnn.guards.memory import resident_gib
from contextual_cnn.task import Batch, Outcome


class TrainMeter:
    """Adds up on the device; only `read` waits for it, and crosses the ranks once.

    skipped_in_a_row: scalar on the device, the steps just now that were not taken.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = Sums(world.device)
        self._percentages: set[str] = set()
        self.skipped_in_a_row = torch.zeros((), device=world.device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """What happened since the last read is no part of the training speed."""
        self._since, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @torch.no_grad()
    def add_micro_batch(self, outcome: Outcome, batch: Batch) -> None:
        samples = batch.size
        self._sums.add(
            images=samples,
            bad_images=batch.replaced,
            loss=outcome.loss.detach() * samples,
            **{name: part * samples for name, part in outcome.parts.items()},
            **outcome.hits,
        )
        self._percentages |= outcome.hits.keys()

    def add_step(self, norm: Tensor, finite: Tensor) -> None:
        """The gradient's norm of an optimizer step, and whether the step was taken; the same on all ranks."""
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * ~finite
        self._sums.add(steps=1, grad_norm=norm, skipped_steps=~finite)

    def read(self) -> tuple[dict[str, float], int]:
        """The metrics over all ranks since the last read, and the number of steps in a row that were skipped just now.

        Losses are means over samples, hits percentages of them, data_wait a percentage of the time.
        """
        skipped_in_a_row = int(self.skipped_in_a_row)
        sums = self._sums.read()
        seconds, waited = time.perf_counter() - self._since, self._waited
        self.restart_clock()
        images, steps = sums.pop("images"), sums.pop("steps")
        metrics = {
            "grad_norm": sums.pop("grad_norm") / steps,
            "skipped_steps": sums.pop("skipped_steps") / self._world.size,
            "bad_images": sums.pop("bad_images"),
            "images_per_second": images / seconds,
            "data_wait": 100 * waited / seconds,
            "host_memory_gib": resident_gib(),
        }
        for name, value in sums.items():
            metrics[name] = value / images * (100 if name in self._percentages else 1)
        if self._world.device.type == "cuda":
            metrics["memory_gib"] = memory_in_use(self._world.device) / 2**30
        return metrics, skipped_in_a_row

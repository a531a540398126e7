"""The training metrics between two log steps: what was learned, how fast, and how much of the time was waiting."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from contextual_cnn.contracts import StagedLoss, StagedScores
from contextual_cnn.distributed import World
from contextual_cnn.engine.memory import resident_gib
from contextual_cnn.engine.metrics import Sums, labels_of, stage_hits, top_hits


class TrainMeter:
    """Adds up on the device; only `read` waits for it, and crosses the ranks once.

    skipped_in_a_row: scalar on the device, the steps just now that were not taken.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = Sums(world.device)
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
    def add_micro_batch(self, scores: StagedScores, loss: StagedLoss, targets: Tensor) -> None:
        images, labels = len(targets), labels_of(targets)
        self._sums.add(
            images=images,
            loss=loss.total.detach() * images,
            **{name: part * images for name, part in loss.parts.items()},
            **top_hits(scores.logits[-1], labels, ks=(1,)),
            **stage_hits(scores, labels),
        )

    def add_step(self, norm: Tensor, finite: Tensor) -> None:
        """The gradient's norm of an optimizer step, and whether the step was taken; the same on all ranks."""
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * ~finite
        self._sums.add(steps=1, grad_norm=norm, skipped_steps=~finite)

    def add_bad_images(self, replaced: int) -> None:
        """Images of this rank that others stand in for, because they cannot be read or decoded."""
        self._sums.add(bad_images=replaced)

    def read(self) -> tuple[dict[str, float], int]:
        """The metrics over all ranks since the last read, and the number of steps in a row that were skipped just now.

        Losses are means over images, top1 and recall percentages, data_wait a percentage of the time.
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
            metrics[name] = value / images * (100 if name.startswith(("top1", "recall")) else 1)
        if self._world.device.type == "cuda":
            metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics, skipped_in_a_row

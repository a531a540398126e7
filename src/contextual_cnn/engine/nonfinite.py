"""What there is to see of a step whose loss or gradients were not finite: losses by stage, and the batch in a file."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contextual_cnn.contracts import Batch, StagedLoss
from contextual_cnn.distributed import World, all_reduce_sum, gather_numbers

log = logging.getLogger(__name__)


@torch.no_grad()
def explain_nonfinite(
    micro_batches: Iterable[tuple[Batch, Callable[[], StagedLoss]]],
    *,
    folder: Path,
    step: int,
    lr: float,
    world: World,
) -> str:
    """Saves a micro-batch of the step per rank that has a bad one, and describes the step; called by all ranks.

    Args:
        micro_batches: this rank's, each with what computes its loss.
        step: counted from 0.

    Returns:
        Losses by stage over all ranks (not finite where one of them is), lr, and where the batches are.
    """
    worst: tuple[bool, Batch, StagedLoss] | None = None
    parts: dict[str, Tensor] = {}
    for batch, compute in micro_batches:
        loss = compute()
        for name, part in loss.parts.items():
            parts[name] = parts[name] + part.double() if name in parts else part.double()
        is_bad = not bool(torch.isfinite(loss.total))
        if worst is None or (is_bad and not worst[0]):
            worst = (is_bad, batch, loss)
    assert worst is not None  # a step has at least one micro-batch
    is_bad, batch, loss = worst
    bad_ranks = [rank for rank, (bad,) in enumerate(gather_numbers([int(is_bad)])) if bad]
    if world.rank in (bad_ranks or [0]):
        evidence = {"images": batch.images.cpu(), "targets": batch.targets.cpu(), "step": step, "lr": lr}
        evidence["losses"] = {name: float(part) for name, part in loss.parts.items()}
        _save(evidence, folder / f"step_{step + 1}_rank_{world.rank}.pt")
    sums = all_reduce_sum(torch.stack(list(parts.values()))).tolist()
    losses = ", ".join(f"{name} {value:.3g}" for name, value in zip(parts, sums, strict=True))
    where = f"loss not finite on rank {', '.join(map(str, bad_ranks))}" if bad_ranks else "finite loss"
    return f"{where}, summed losses by stage: {losses}; lr {lr:.3g}; batch in {folder}"


def _save(evidence: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        torch.save(evidence, path)
    except (OSError, RuntimeError) as error:
        log.warning("%s was not written: %s", path, error)

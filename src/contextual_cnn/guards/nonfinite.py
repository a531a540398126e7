"""What there is to see of a step whose loss or gradients were not finite: losses by stage, and the batch in a file."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contextual_cnn.distributed import World, all_reduce_sum, gather_numbers
from contextual_cnn.task import Outcome

log = logging.getLogger(__name__)


@torch.no_grad()
def explain_nonfinite(
    micro_batches: Iterable[tuple[dict[str, Any], Outcome]],
    *,
    folder: Path,
    step: int,
    lr: float,
    world: World,
) -> str:
    """Saves a micro-batch of the step per rank that has a bad one, and describes the step; called by all ranks.

    Args:
        micro_batches: this rank's, as they are to be saved, and their outcomes.
        step: counted from 0.

    Returns:
        Losses by stage over all ranks (not finite where one of them is), lr, and where the batches are.
    """
    worst: tuple[bool, dict[str, Any], Outcome] | None = None
    losses: dict[str, Tensor] = {}
    for batch, outcome in micro_batches:
        for name, part in (outcome.parts or {"loss": outcome.loss.detach()}).items():
            losses[name] = losses[name] + part.double() if name in losses else part.double()
        is_bad = not bool(torch.isfinite(outcome.loss))
        if worst is None or (is_bad and not worst[0]):
            worst = (is_bad, batch, outcome)
    assert worst is not None  # a step has at least one micro-batch
    is_bad, batch, outcome = worst
    bad_ranks = [rank for rank, (bad,) in enumerate(gather_numbers([int(is_bad)])) if bad]
    if world.rank in (bad_ranks or [0]):
        evidence = batch | {"step": step, "lr": lr}
        evidence["losses"] = {name: float(part) for name, part in outcome.parts.items()}
        _save(evidence, folder / f"step_{step + 1}_rank_{world.rank}.pt")
    sums = all_reduce_sum(torch.stack(list(losses.values()))).tolist()
    by_name = ", ".join(f"{name} {value:.3g}" for name, value in zip(losses, sums, strict=True))
    where = f"loss not finite on rank {', '.join(map(str, bad_ranks))}" if bad_ranks else "finite loss"
    return f"{where}, summed losses by stage: {by_name}; lr {lr:.3g}; batch in {folder}"


def _save(evidence: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        torch.save(evidence, path)
    except (OSError, RuntimeError) as error:
        log.warning("%s was not written: %s", path, error)

"""Whether and from what a run goes on: its own newest checkpoint, if it is still the same run."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.distributed import World, gather_numbers
from contextual_cnn.errors import UserError
from contextual_cnn.runs.checkpoint_entries import require_entries
from contextual_cnn.runs.checkpoint_store import CheckpointStore
from contextual_cnn.settings.keys import LATER_KEYS

log = logging.getLogger(__name__)

_NONE, _UNUSABLE = -1, -2  # in the place of a checkpoint's number

_NEEDED = ("config", "classes", "best", "ema", "optimizer", "epoch", "ended_step", "images", "listing", "batches")


def read_newest(store: CheckpointStore, world: World) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be used, and its file; None if there is none. Called by all ranks.

    One process of a node reads and checks it; the others then map the same pages, so that a node reads it once.

    Raises:
        UserError: there are some, and none can be used.
    """
    found, failure, number = None, None, _NONE
    if world.local_rank == 0:
        try:
            if (found := store.newest()) is not None:
                number = store.number_of(found[0])
        except UserError as error:
            failure, number = error, _UNUSABLE
    numbers = [theirs for (theirs,) in gather_numbers([number])]
    if failure is not None:
        raise failure
    chosen = numbers[world.rank - world.local_rank]
    if chosen == _UNUSABLE:
        raise UserError(
            "none of the checkpoints of this run can be used", "see what the first process of this node says"
        )
    return store.mapped(chosen) if world.local_rank and chosen != _NONE else found


def check_resumed(
    found: tuple[Path, dict[str, Any]] | None,
    record: Mapping[str, Any],
    plan: BatchPlan,
    policy: str,
    free: Collection[str],
) -> dict[str, Any] | None:
    """The state to go on from, if it is still the same run; None for a run without a checkpoint.

    Args:
        found: what `read_newest` gave.
        record: what a checkpoint of this run holds of its config and data: "config", "classes", "images", "listing".
        policy: "auto" refuses a checkpoint of another config or data; "anyway" says what differs and goes on.
        free: keys that may change without making another run of it.

    Raises:
        UserError: what differs.
    """
    if found is None:
        return None
    path, state = found
    require_entries(state, path, *_NEEDED)
    differences = _differences(state["config"], record["config"], free)
    if state["listing"] != record["listing"]:
        before, now = (f"{data['images']} files (hash {data['listing'][:8]})" for data in (state, record))
        differences.append(f"training images: {before} -> {now}")
    if state["classes"] != record["classes"]:
        raise UserError(
            f"{path} was trained on other classes than {record['config']['data']['root']} has",
            "run_name=NEW_NAME",
        )
    batch_before = _flatten(state["config"]).get("trainer.global_batch_size")
    if batch_before != plan.global_batch:
        raise UserError(
            f"{path} counts steps of {batch_before} images, trainer.global_batch_size={plan.global_batch} counts "
            "others: images of the epoch would be lost or repeated",
            f"trainer.global_batch_size={batch_before} (any number of processes that divides it), or run_name=NEW_NAME",
        )
    if differences and policy == "auto":
        raise UserError(
            f"{path} is of a run with another configuration: {'; '.join(differences[:6])}",
            "run_name=NEW_NAME starts another run; resume=anyway goes on with the new values",
        )
    for difference in differences:
        log.warning("resuming with another value than before: %s", difference)
    log.info("resuming %s from step %d (epoch %d complete)", path, state["step"], state["epoch"])
    _report_batches(state, plan)
    return state


def _report_batches(state: Mapping[str, Any], plan: BatchPlan) -> None:
    """Another number of processes changes no image's place, and since DRAWS 2 another micro-batch no draw."""
    processes, micro_batch = state["batches"]
    if processes != plan.world_size:
        log.info(
            "the checkpoint is of %d processes, these are %d: the global batches are shared out anew, and no image of "
            "the epoch is lost or repeated",
            processes,
            plan.world_size,
        )
    if micro_batch != plan.micro_batch and state.get("draws", 1) == 1:
        log.warning(
            "micro-batches of %d images instead of %d: mixing and dropped paths are drawn anew from here on",
            *(plan.micro_batch, micro_batch),
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    old, new = (_flatten(LATER_KEYS) | _flatten(config) for config in (before, now))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free
    ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat

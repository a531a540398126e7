"""Whether and from what a run goes on: its own last checkpoint, if it is still the same run."""

import logging
from collections.abc import Mapping
from typing import Any

from contextual_cnn.engine.checkpoint import CheckpointStore, load_checkpoint
from contextual_cnn.errors import UserError

log = logging.getLogger(__name__)

# What may change from one start to the next without making another run of it
_FREE = (
    "output_dir",
    "resume",
    "data.root",
    "data.threads",
    "data.prefetch",
    "data.eval_batch_size",
    "data.on_bad_image",
    "data.max_bad_images",
    "model.grad_checkpointing",
    "trainer.device",
    "trainer.micro_batch_size",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.max_steps",
    "trainer.max_skipped_steps",
    "trainer.log_every",
    "trainer.eval_every",
    "trainer.timeout_minutes",
    "checkpoint.",
    "logger.",
)


def load_last(
    store: CheckpointStore, config: Mapping[str, Any], classes: tuple[str, ...], images: int, policy: str
) -> dict[str, Any] | None:
    """The state to go on from; None for a run without a checkpoint.

    Args:
        policy: "auto" refuses a checkpoint of another config or data; "anyway" says what differs and goes on.

    Raises:
        UserError: what differs.
    """
    if not store.last.exists():
        return None
    state = load_checkpoint(store.last)
    differences = _differences(state["config"], config)
    if state["images"] != images:
        differences.append(f"training images: {state['images']} -> {images}")
    if tuple(state["classes"]) != classes:
        raise UserError(
            f"{store.last} was trained on other classes than {config['data']['root']} has",
            "run_name=NEW_NAME",
        )
    if differences and policy == "auto":
        raise UserError(
            f"{store.last} is of a run with another configuration: {'; '.join(differences[:6])}",
            "run_name=NEW_NAME starts another run; resume=anyway goes on with the new values",
        )
    for difference in differences:
        log.warning("resuming with another value than before: %s", difference)
    log.info("resuming %s from step %d (epoch %d complete)", store.last, state["step"], state["epoch"])
    return state


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = _flatten(before), _flatten(now)
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE)
    ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat

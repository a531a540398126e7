"""What a checkpoint holds, entry by entry. A checkpoint is somebody's input: each entry is looked at before it is used.

format       the version of this list
model, ema   tensors by name, raw and averaged; ema is None without an average
config       what was trained: groups of plain values, "model" and "data" among them
classes      their names, in the order of the logits
best         of the best evaluation so far: its figure (top1), epoch, and which weights it was of, "raw" or "ema"
step ...     where the training stands
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from contextual_cnn.errors import UserError

FORMAT = 2
_MOST_VALUES, _DEEPEST = 10_000, 8  # of a config; ours have about 120 values in 4 levels
OTHER_FILE = "use another checkpoint of the run (last.pt, previous.pt, best.pt)"


class DamagedCheckpoint(UserError):
    """A file that is not what was written: cut short, changed, never completed, or not to be read at all."""


class NewerFormat(UserError):
    """A file that a later version of this program has written."""


def check_entries(state: Any, path: Any, size: int) -> None:
    """Whether this is a checkpoint, and every entry that is there is of its type.

    Args:
        path: of the file, for the message.
        size: the file's bytes; tensors cannot be larger.

    Raises:
        DamagedCheckpoint: an entry of another type, or without its bytes in the file.
        NewerFormat: a later version has written it.
        UserError: not a checkpoint of this program.
    """
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise UserError(f"{path} is no checkpoint of this program", "bare weights are loaded by model.weights=FILE")
    for name, (what, is_right) in _ENTRIES.items():
        if name in state and not is_right(state[name]):
            raise DamagedCheckpoint(f"{path}: its entry {name!r} is not {what}", OTHER_FILE)
    if state["format"] > FORMAT:
        raise NewerFormat(
            f"{path} has format {state['format']}, this version reads up to {FORMAT}", "update contextual-cnn"
        )
    require_entries(state, path, "step")
    for name in ("model", "ema"):
        tensors = (state.get(name) or {}).values()
        # A view of one number may have any shape
        if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > size:
            raise DamagedCheckpoint(f"{path}: the tensors of {name!r} are larger than the file", OTHER_FILE)


def require_entries(state: Mapping[str, Any], path: Any, *names: str) -> None:
    """Raises DamagedCheckpoint if one of the entries is missing."""
    missing = [name for name in names if name not in state]
    if missing:
        raise DamagedCheckpoint(f"{path} lacks the entries {', '.join(missing)}", OTHER_FILE)


def choose_weights(state: Mapping[str, Any], wanted: str = "auto") -> tuple[str, dict[str, Tensor]]:
    """The weights of a checkpoint and their name, "raw" or "ema".

    Args:
        wanted: "auto" takes those that made the checkpoint the best, by its own record.

    Raises:
        UserError: the average is wanted, and there is none.
    """
    name = state["best"]["weights"] if wanted == "auto" else wanted
    if name == "ema" and state["ema"] is None:
        if wanted == "ema":
            raise UserError("weights=ema, but the checkpoint holds no moving average", "weights=raw")
        name = "raw"
    return name, state["model" if name == "raw" else "ema"]


def _is_count(value: Any) -> bool:
    """An integer from 0 on, and no boolean."""
    return type(value) is int and value >= 0


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(name) is str
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        for name, tensor in value.items()
    )


def _is_config(value: Any) -> bool:
    """Keys, lists, and plain values. Counted, as a list may hold itself, or another one a million times."""
    if not isinstance(value, dict):
        return False
    waiting, seen = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > _MOST_VALUES or depth > _DEEPEST:
            return False
        if isinstance(value, dict):
            if not all(type(key) is str for key in value):
                return False
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        elif value is not None and type(value) not in (bool, int, float, str):
            return False
    return True


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(name) is str for name in value)


def _is_record(value: Any) -> bool:
    """A figure under the name that the task has for it, beside epoch and weights."""
    if not isinstance(value, dict) or len(value) != 3 or not value.keys() >= {"epoch", "weights"}:
        return False
    figures = [figure for name, figure in value.items() if name not in ("epoch", "weights")]
    is_number = type(figures[0]) in (int, float) and math.isfinite(figures[0])
    return is_number and _is_count(value["epoch"]) and type(value["weights"]) is str and value["weights"] in _WEIGHTS


_WEIGHTS = ("raw", "ema")
_COUNT = ("an integer of 0 or more", _is_count)
_STATE = ("tensors by name", _is_state)
_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": _COUNT,
    "model": _STATE,
    "ema": ("tensors by name, or None", lambda value: value is None or _is_state(value)),
    "optimizer": ("keys and values", lambda value: isinstance(value, dict)),
    "config": ("keys and plain values", _is_config),
    "classes": ("a list of names", _are_names),
    "best": ("a figure, epoch, and weights of raw or ema", _is_record),
    "step": _COUNT,
    "epoch": _COUNT,
    "ended_step": _COUNT,
    "draws": _COUNT,
    "norm_images": _COUNT,
    "images": _COUNT,
    "listing": ("a text", lambda value: type(value) is str),
    "batches": (
        "two integers",
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)),
    ),
}

"""A copy of a state in the CPU's memory, to be written while the training goes on.

The copies lie together in a few large storages. torch.save takes Python's lock anew for every storage it writes;
with the thousand small ones of a model it and the training held each other up for seconds (measured).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_STORAGE_BYTES = 16 << 20


def take_snapshot(state: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """A copy that no later step changes, and what to call before it is read.

    Copies from a GPU are queued behind the step that made the state, and are not waited for here.
    """
    tensors = [tensor.detach() for tensor in _tensors(state)]
    copies: dict[int, Tensor] = {}
    for group in _groups(tensors):
        first = tensors[group[0]]
        sizes = [tensors[i].numel() for i in group]
        storage = torch.empty(sum(sizes), dtype=first.dtype, pin_memory=first.is_cuda)
        for i, room in zip(group, storage.split(sizes), strict=True):
            copies[i] = _shaped_like(tensors[i], room).copy_(tensors[i], non_blocking=True)
    in_order = iter([copies[i] for i in range(len(tensors))])
    snapshot = _rebuild(state, in_order)
    if not any(tensor.is_cuda for tensor in tensors):
        return snapshot, lambda: None
    copied = torch.cuda.Event()
    copied.record()
    return snapshot, copied.synchronize


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _rebuild(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with the tensors that come, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _rebuild(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rebuild(item, tensors) for item in value)
    return value


def _groups(tensors: list[Tensor]) -> list[list[int]]:
    """Positions of tensors that share a storage: of one type and kind of device, up to _STORAGE_BYTES."""
    groups: dict[tuple, list[list[int]]] = {}
    filled: dict[tuple, int] = {}
    for i, tensor in enumerate(tensors):
        kind = (tensor.dtype, tensor.is_cuda)
        filled[kind] = filled.get(kind, _STORAGE_BYTES) + tensor.nbytes
        if filled[kind] > _STORAGE_BYTES:
            groups.setdefault(kind, []).append([])
            filled[kind] = tensor.nbytes
        groups[kind][-1].append(i)
    return [group for of_kind in groups.values() for group in of_kind]


def _shaped_like(tensor: Tensor, room: Tensor) -> Tensor:
    """A view of the room with the tensor's shape, channels last where the tensor is."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = tensor.shape
        return room.view(n, h, w, c).permute(0, 3, 1, 2)
    return room.view(tensor.shape)

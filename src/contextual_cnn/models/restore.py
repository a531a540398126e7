"""A trained model again, from the config and the tensors of a checkpoint; both are somebody's input."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from contextual_cnn.errors import UserError
from contextual_cnn.models.build import build_model
from contextual_cnn.settings.model import ModelSettings

Model = TypeVar("Model", bound=nn.Module)

_SPARE = 1000  # parameters; a model may register some that it replaces again


def restore_model(settings: ModelSettings, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model of these settings with these weights, on the CPU.

    Nothing is allocated before names, shapes and types agree: settings that ask for more than the file holds cost
    nothing.

    Raises:
        UserError: settings that make no model, or tensors of another model.
    """
    settings = replace(settings, weights=None)  # a path in a file that came from elsewhere is not followed
    return restore_tensors(lambda: build_model(settings), tensors, settings.name)


def restore_tensors(build: Callable[[], Model], tensors: Mapping[str, Tensor], name: str) -> Model:
    """As `restore_model`, of whatever is built; name is what messages call it."""
    with torch.device("meta"), _at_most(10 * len(tensors) + _SPARE):
        sketch = build().state_dict()
    missing = [key for key in sketch if key not in tensors]
    other = [key for key in tensors if key not in sketch or _kind(tensors[key]) != _kind(sketch[key])]
    if missing or other:
        raise UserError(
            f"the tensors are not those of {name} as it is configured: {len(missing)} missing "
            f"(first: {missing[:3]}), {len(other)} unknown or of another shape (first: {other[:3]})",
            "use weights and a configuration of the same run",
        )
    model = build()
    model.load_state_dict(tensors)
    return model


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stops the construction of a model at so many parameters, as a number of layers may be any number."""
    registered = 0

    def count(*_: Any) -> None:
        nonlocal registered
        registered += 1
        if registered > parameters:
            raise ValueError("it has more layers than the file has tensors")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()

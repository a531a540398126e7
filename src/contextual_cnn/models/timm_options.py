"""What a config may ask of a backbone beside the keys of its group: a closed list, by model.

timm passes every keyword on until something takes it, and its loader is on that way: pretrained, pretrained_cfg,
cache_dir and checkpoint_path fetch files and write them where they say. A config may come from a stranger's checkpoint,
so it names keywords of the backbone's own class alone, and gives them numbers, names and lists of these.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, load_pretrained, resolve_pretrained_cfg

from contextual_cnn.errors import UserError
from contextual_cnn.settings.model import LARGEST

_LOADERS = (timm.create_model, build_model_with_cfg, load_pretrained, resolve_pretrained_cfg)
_TAKEN_BEFORE = {"features_only", "out_indices", "feature_cls", "pruned", "cfg", "device", "dtype"}
_NAME = re.compile(r"[\w.-]{0,64}", re.ASCII)  # as gelu or layernorm2d; no path and no address
_DEEPEST = 3  # lists of lists


def check_timm_options(name: str, options: Mapping[str, Any], own: Mapping[str, str]) -> None:
    """Whether the model's class has these options, and the values are plain and of a size that can be built.

    Args:
        name: of a model that timm has.
        own: the options that are set by keys of the model group, and these keys.

    Raises:
        UserError: the first that is not so.
    """
    known = sorted(_options_of(name) - own.keys())
    for key, value in options.items():
        if key in own:
            raise UserError(f"model.timm_options: {key} has a key of its own", f"model.{own[key]}={value}")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            raise UserError(
                f"model.timm_options: {name} has no option {key!r} that a config may set",
                f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}",
            )
        if not _is_plain(value):
            raise UserError(
                f"model.timm_options.{key} is a number up to {LARGEST} (a list in sum), a name, or a list of these, "
                f"got {value!r:.60}",
                "leave it out",
            )


@functools.cache
def _options_of(name: str) -> frozenset[str]:
    """The keywords of a model's class and of the classes that it passes keywords on to, without those of timm's loader.

    A contextual model takes those of its plain twin.
    """
    twin = name.removeprefix("contextual_")
    with torch.device("meta"):
        model = timm.create_model(twin if timm.is_model(twin) else name, pretrained=False)
    found: set[str] = set()
    for cls in type(model).__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    of_the_loader = {parameter for loader in _LOADERS for parameter in inspect.signature(loader).parameters}
    return frozenset(found - of_the_loader - _TAKEN_BEFORE)


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list):
        numbers = sum(abs(item) for item in value if type(item) is int)
        return depth < _DEEPEST and numbers <= LARGEST and all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, str):
        return _NAME.fullmatch(value) is not None
    return value is None or (isinstance(value, int | float) and abs(value) <= LARGEST)

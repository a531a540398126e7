"""A model from its config: ours or any other of timm's, under the same recipe, optionally from given weights."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from contextual_cnn.contracts import TimmModel
from contextual_cnn.errors import UserError
from contextual_cnn.models.class_context import FEWEST_CLASSES, ClassCountError, ProjectionNorm, default_class_counts
from contextual_cnn.models.contextual_conv import Convolution
from contextual_cnn.models.contextual_model import ContextualModel, Selection
from contextual_cnn.models.timm_options import LARGEST, check_timm_options
from contextual_cnn.models.weights import load_weights

# What a model raises for an option that it cannot use has no common class
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def build_model(
    *,
    name: str,
    num_classes: int,
    drop_path_rate: float | None = None,
    drop_rate: float = 0.0,
    layer_scale: float | None = None,
    grad_checkpointing: bool = False,
    weights: str | None = None,
    class_counts: Sequence[int] | None = None,
    embedding_dim: int | None = None,
    projection_norm: ProjectionNorm | None = None,
    selection: Selection | None = None,
    contextual_stages: Sequence[int] | None = None,
    contextual_every: int | None = None,
    convolution: Convolution | None = None,
    mask: bool | None = None,
    timm_options: dict | None = None,
) -> nn.Module:
    """A timm-registered model, initialised or from a file of weights.

    Args:
        name: of an architecture that timm has, ours among them.
        drop_path_rate, layer_scale: stochastic depth and the initial layer scale; None leaves the model's default.
        weights: a .pth, .pt or .safetensors file, or a run folder. A contextual model takes those of its plain twin
            and then starts as an exact drop-in for it.
        class_counts, embedding_dim, projection_norm, selection, contextual_stages, contextual_every, convolution, mask:
            contextual models only, see `ContextualConvNeXt`; None leaves the default.
        timm_options: what else the backbone's class takes by keyword, such as patch_size: see `check_timm_options`.

    Raises:
        UserError: unknown name, options that the model does not have, weights that do not fit.
    """
    for key, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate or 0.0)):
        if not 0 <= rate < 1:
            raise UserError(f"model.{key} must be at least 0 and below 1, got {rate}", f"model.{key}=0.1")
    for key, size in (("embedding_dim", embedding_dim), ("contextual_every", contextual_every)):
        if size is not None and not 1 <= size <= LARGEST:
            raise UserError(f"model.{key} must be from 1 to {LARGEST}, got {size}", f"model.{key}=null is its default")
    _check_name(name)
    options = {
        "num_classes": num_classes,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        "ls_init_value": layer_scale,
        "class_counts": class_counts,
        "embedding_dim": embedding_dim,
        "projection_norm": projection_norm,
        "selection": selection,
        "contextual_stages": contextual_stages,
        "contextual_every": contextual_every,
        "convolution": convolution,
        "mask": mask,
    }
    if timm_options:
        check_timm_options(name, timm_options, {key: key for key in options} | {"ls_init_value": "layer_scale"})
    options = {key: value for key, value in options.items() if value is not None} | (timm_options or {})
    model = _create(name, options, grad_checkpointing)
    if weights is not None:
        load_weights(model, Path(weights))
    return model


def _create(name: str, options: dict[str, Any], grad_checkpointing: bool) -> nn.Module:
    try:
        model = timm.create_model(name, pretrained=False, **options)  # nothing is fetched, whatever the options are
        cast(TimmModel, model).set_grad_checkpointing(grad_checkpointing)
    except ClassCountError as error:
        raise UserError(str(error), _fix_of_classes(name, options["num_classes"])) from error
    except _REFUSALS as error:
        raise UserError(
            f"model {name} cannot be built with all of {', '.join(options)}: {error!s:.300} ({type(error).__name__})",
            "set that key of the model group to null",
        ) from error
    return model


def _check_name(name: str) -> None:
    """Only what timm has registered: not a tag, an address (hf-hub:OWNER/NAME) or a path (local-dir:PATH)."""
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5) or timm.list_models("contextual_*")
        raise UserError(
            f"there is no model named {name!r}",
            f"did you mean {', '.join(near)}? python scripts/describe_model.py '*{name.split('_')[0]}*' lists more",
        )
    if dot:
        raise UserError(
            f"model.name={name!r}: in timm the tag {tag!r} names trained weights, and a name loads none here",
            f"model.name={architecture} starts from random weights, with model.weights=FILE from those of the tag",
        )


def _fix_of_classes(name: str, num_classes: int) -> str:
    if num_classes < FEWEST_CLASSES:
        return f"model=timm model.name={name.removeprefix('contextual_')} is the plain twin, for any number of classes"
    counts = ",".join(map(str, default_class_counts(num_classes)))
    return f"model.class_counts=[{counts}], which null takes too"


def describe(model: nn.Module) -> str:
    """One line for the log: size and, of a contextual model, its classes from stage to stage."""
    text = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {model.num_classes} classes"
    if not isinstance(model, ContextualModel):
        return text
    return f"{text} -> {' -> '.join(map(str, model.shortlist_sizes.values()))}, selection {model.selection}"

"""A model from its config: ours or any other of timm's, under the same recipe, optionally from given weights."""

import difflib
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from contextual_cnn.contracts import TimmModel
from contextual_cnn.errors import UserError
from contextual_cnn.models.class_context import FEWEST_CLASSES, ClassCountError, default_class_counts
from contextual_cnn.models.context_options import CONTEXT_KEYS
from contextual_cnn.models.contextual_model import ContextualModel
from contextual_cnn.models.depthwise import use_own_depthwise
from contextual_cnn.models.timm_options import check_timm_options
from contextual_cnn.models.weights import load_weights
from contextual_cnn.settings.model import ModelSettings

# Keys of the model group that are keywords of the model's class, or of timm's
_OPTIONS = ("num_classes", "drop_rate", "drop_path_rate", *CONTEXT_KEYS)

# What a model raises for an option that it cannot use has no common class
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def build_model(settings: ModelSettings) -> nn.Module:
    """The model of these settings; num_classes must be known by now.

    Raises:
        UserError: unknown name, options that the model does not have, weights that do not fit.
    """
    name, timm_options = settings.name, settings.timm_options or {}
    _check_name(name)
    options = {key: getattr(settings, key) for key in _OPTIONS} | {"ls_init_value": settings.layer_scale}
    if timm_options:
        check_timm_options(name, timm_options, {key: key for key in options} | {"ls_init_value": "layer_scale"})
    options = {key: value for key, value in options.items() if value is not None} | timm_options
    model = _create(name, options, settings.grad_checkpointing)
    if settings.depthwise == "ours":
        use_own_depthwise(model)
    if settings.weights is not None:
        load_weights(model, Path(settings.weights))
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
            f"did you mean {', '.join(near)}? more: python scripts/model/describe_model.py '*{name.split('_')[0]}*'",
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


def summarize(model: nn.Module) -> str:
    """One line for the log: size and, of a contextual model, its classes from stage to stage."""
    text = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {model.num_classes} classes"
    if not isinstance(model, ContextualModel):
        return text
    return f"{text} -> {' -> '.join(map(str, model.shortlist_sizes.values()))}, selection {model.selection}"

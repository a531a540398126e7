"""A model from its config: ours or any other of timm's, under the same recipe, optionally from given weights."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import timm
from torch import nn

from contextual_cnn.errors import UserError
from contextual_cnn.models.class_context import ProjectionNorm
from contextual_cnn.models.contextual_conv import Convolution
from contextual_cnn.models.contextual_model import ContextualModel, Selection
from contextual_cnn.models.weights import load_weights


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
        name: as `timm.create_model` takes it.
        drop_path_rate, layer_scale: stochastic depth and the initial layer scale; None leaves the model's default.
        weights: a .pth, .pt or .safetensors file. A contextual model takes those of its plain twin and then starts
            as an exact drop-in for it.
        class_counts, embedding_dim, projection_norm, selection, contextual_stages, contextual_every, convolution, mask:
            contextual models only, see `ContextualConvNeXt`; None leaves the default.
        timm_options: what else the model takes by keyword (timm's own --model-kwargs), such as patch_size.

    Raises:
        UserError: unknown name, options that the model does not have, weights that do not fit.
    """
    for key, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate or 0.0)):
        if not 0 <= rate < 1:
            raise UserError(f"model.{key} must be at least 0 and below 1, got {rate}", f"model.{key}=0.1")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5) or timm.list_models("contextual_*")
        raise UserError(
            f"there is no model named {name!r}",
            f"did you mean {', '.join(near)}? python scripts/describe_model.py '*{name.split('_')[0]}*' lists more",
        )
    options = {
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
    options = {key: value for key, value in options.items() if value is not None} | (timm_options or {})
    try:
        model = timm.create_model(name, num_classes=num_classes, drop_rate=drop_rate, **options)
    except ValueError as error:
        raise UserError(
            str(error), "model.class_counts=null and model.contextual_stages=[2,3,4] are the defaults"
        ) from error
    except TypeError as error:  # timm models refuse options they do not have
        raise UserError(
            f"model {name} does not take all of {', '.join(options)}: {error}",
            "set that key of the model group to null",
        ) from error
    model.set_grad_checkpointing(grad_checkpointing)
    if weights is not None:
        load_weights(model, Path(weights))
    return model


def describe(model: nn.Module) -> str:
    """One line for the log: size and, of a contextual model, its classes from stage to stage."""
    text = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {model.num_classes} classes"
    if not isinstance(model, ContextualModel):
        return text
    return f"{text} -> {' -> '.join(map(str, model.shortlist_sizes.values()))}, selection {model.selection}"

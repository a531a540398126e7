"""A model from its config: ours or any other of timm's, under the same recipe, optionally from given weights."""

import logging
from collections.abc import Sequence
from pathlib import Path

import timm
from timm.models import load_state_dict
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor, nn

from contextual_cnn.errors import UserError
from contextual_cnn.models.contextual_conv import Convolution
from contextual_cnn.models.contextual_model import ContextualModel, Selection

log = logging.getLogger(__name__)

# Parts that a plain model has and a contextual one has not, or the reverse
_PLAIN_HEAD = ("head.", "norm_pre.", "fc.")
_CONTEXTUAL_ONLY = (
    "class_embeddings.",
    "projections.",
    "mergings.",
    ".weight_offset.",
    ".sampling_offset.",
    ".mask.",
    ".from_context.",
    ".offset_mask.",
)


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
    selection: Selection | None = None,
    contextual_stages: Sequence[int] | None = None,
    contextual_every: int | None = None,
    convolution: Convolution | None = None,
    mask: bool | None = None,
) -> nn.Module:
    """A timm-registered model, initialised or from a file of weights.

    Args:
        name: as `timm.create_model` takes it.
        drop_path_rate, layer_scale: stochastic depth and the initial layer scale; None leaves the model's default.
        weights: a .pth, .pt or .safetensors file. A contextual model takes those of its plain twin and then starts
            as an exact drop-in for it.
        class_counts, embedding_dim, selection, contextual_stages, contextual_every, convolution, mask: contextual
            models only, see `ContextualConvNeXt`; None leaves the default.

    Raises:
        UserError: unknown name, options that the model does not have, weights that do not fit.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5] or timm.list_models("contextual_*")
        raise UserError(
            f"there is no model named {name!r}", f"model.name is a timm model, for example {', '.join(near)}"
        )
    options = {
        "drop_path_rate": drop_path_rate,
        "ls_init_value": layer_scale,
        "class_counts": class_counts,
        "embedding_dim": embedding_dim,
        "selection": selection,
        "contextual_stages": contextual_stages,
        "contextual_every": contextual_every,
        "convolution": convolution,
        "mask": mask,
    }
    options = {key: value for key, value in options.items() if value is not None}
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
    return f"{text} -> {' -> '.join(map(str, model.shortlist_sizes))}, selection {model.selection}"


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads timm, original ConvNeXt or our own weights from a file, and says what was left at its initial value.

    Only the classifier of another number of classes, and what a plain model does not have, may be left out.

    Raises:
        UserError: no such file, not a file of weights, or weights of another architecture.
    """
    if not path.is_file():
        raise UserError(f"model.weights: there is no file {path}", "give the path of a .pth, .pt or .safetensors file")
    try:
        state = load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:
        # whatever a damaged or hostile file raises: the unpickler's errors have no common class
        # (torch's own text advises to switch the check off)
        raise UserError(
            f"model.weights: {path} cannot be read as weights: it is damaged, or holds more than tensors "
            f"({type(error).__name__})",
            "use another file",
        ) from error
    if any(".dwconv." in key for key in state):
        state = checkpoint_filter_fn(state, model)  # original ConvNeXt names
    own = model.state_dict()
    if isinstance(model, ContextualModel):
        state = {key: value for key, value in state.items() if not key.startswith(_PLAIN_HEAD)}
    state = {key: value for key, value in state.items() if not _is_other_classifier(key, value, own)}
    wrong = [key for key, value in state.items() if key not in own or own[key].shape != value.shape]
    missing = [key for key in own if key not in state and not _may_be_missing(key)]
    if wrong or missing:
        raise UserError(
            f"model.weights: {path} does not fit: {len(missing)} tensors missing (first: {missing[:3]}), "
            f"{len(wrong)} unknown or of another shape (first: {wrong[:3]})",
            "use weights of the same architecture",
        )
    model.load_state_dict(state, strict=False)
    log.info("weights from %s: %d tensors loaded, %d left as initialised", path, len(state), len(own) - len(state))


def _is_other_classifier(key: str, value: Tensor, own: dict[str, Tensor]) -> bool:
    """A classifier for another number of classes: to be learned anew."""
    is_classifier = key.startswith(("head.", "fc.", "classifier.", "class_embeddings.weight"))
    return is_classifier and key in own and own[key].shape != value.shape


def _may_be_missing(key: str) -> bool:
    return key.startswith(("head.", "fc.", "classifier.")) or any(part in key for part in _CONTEXTUAL_ONLY)

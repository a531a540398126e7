"""Weights of other origin: timm's plain twins, the original ConvNeXt, the released contextual code, our own.

`checkpoint_filter_fn` is the filter that timm's loader calls; `load_weights` is for a file of a run's config.
"""

import logging
import re
from pathlib import Path
from typing import cast

from timm.models import load_state_dict
from timm.models.convnext import checkpoint_filter_fn as original_convnext_names
from torch import Tensor, nn

from contextual_cnn.contracts import TimmModel
from contextual_cnn.errors import UserError
from contextual_cnn.models.contextual_model import ContextualModel
from contextual_cnn.runs.checkpoint import is_checkpoint, load_trained
from contextual_cnn.runs.checkpoint_entries import choose_weights, require_entries
from contextual_cnn.runs.checkpoint_files import find_checkpoint

log = logging.getLogger(__name__)

_DETECTORS_BODY = "backbone.body."

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
    ".scale_shift.",
)
# What the released code computes in another form: its merging ends in half a stage's width instead of one embedding
# size, its offsets come from dense convolutions of a bottleneck, and positions, weights and mask from one layer.
_RELEASED_ONLY = (".spatial_offset_layer.", ".weight_offset_layer.", "cls.class_mergers.", "cls.class_proj_heads.")
_RELEASED_PROJECTION = re.compile(r"cls\.visual_proj_heads\.(\d)\.nonlinear\.(\d)\.")


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a file of weights, or those of a run, and says what was left at its initial value.

    Of a run folder or a checkpoint of this program it takes the weights that made the checkpoint the best, the raw ones
    or their average. Only the classifier of another number of classes, and what a plain model does not have, may be
    left out.

    Raises:
        UserError: no such file, not a file of weights, or weights of another architecture.
    """
    state = _read(path, say=True)
    try:
        model.load_state_dict(checkpoint_filter_fn(state, model))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"model.weights: {path} does not fit: {error}", "use weights of the same architecture"
        ) from error


def _read(path: Path, say: bool = False) -> dict[str, Tensor]:
    path = path.expanduser()
    if path.is_dir():
        path = find_checkpoint(path, key="model.weights")
    if not path.is_file():
        raise UserError(
            f"model.weights: there is no file {path}",
            "give the path of a .pth, .pt or .safetensors file, or a run folder (outputs/NAME)",
        )
    return _read_checkpoint(path, say) if is_checkpoint(path) else _read_weights(path)


def classes_of_weights(given: str) -> int | None:
    """How many classes a file or run of weights of a contextual model has; None of any other.

    Raises:
        UserError: as `load_weights`.
    """
    state = _read(Path(given))
    table = state.get("class_embeddings.weight", state.get(f"{_DETECTORS_BODY}class_embeddings.weight"))
    return len(table) if table is not None else None


def detector_weights(path: Path) -> dict[str, Tensor] | None:
    """All of a detector of ours; None of any other weights. Raises UserError, as `load_weights`."""
    state = _read(path)
    return state if any(name.startswith(_DETECTORS_BODY) for name in state) else None


def _read_checkpoint(path: Path, say: bool) -> dict[str, Tensor]:
    checkpoint = load_trained(path)
    require_entries(checkpoint, path, "best", "ema")
    name, state = choose_weights(checkpoint)
    if say:
        log.info("weights: the %s weights of %s, of step %d", name, path, checkpoint["step"])
    return state


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Those of another program, by timm, which knows where they keep them."""
    try:
        return load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:
        # whatever a damaged or hostile file raises: the unpickler's errors have no common class
        # (torch's own text advises to switch the check off)
        raise UserError(
            f"model.weights: {path} cannot be read as weights: it is damaged, or holds more than tensors "
            f"({type(error).__name__})",
            "use another file",
        ) from error


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under any of the known names -> a complete state of the model.

    What a plain model does not have, and the classifier of another number of classes, keep the model's values.

    Raises:
        ValueError: weights of another architecture.
    """
    if any(".dwconv.conv." in key or key.startswith("cls.class_token_embedding.") for key in state):
        state = _from_released(state)
    if any(".dwconv." in key for key in state):
        ours = {key: value for key, value in state.items() if key.startswith(_CONTEXTUAL_ONLY)}
        theirs = {key: value for key, value in state.items() if key not in ours}
        state = original_convnext_names(theirs, model) | ours
    own = model.state_dict()
    if isinstance(model, ContextualModel):
        state = {key: value for key, value in state.items() if not key.startswith(_PLAIN_HEAD)}
    if model.num_classes:
        state = {key: value for key, value in state.items() if not _is_other_classifier(key, value, own)}
    first = cast(TimmModel, model).pretrained_cfg["first_conv"]
    input_weight = f"{first}.weight"  # timm's loader adapts it to other channels
    fits = {
        key for key, value in state.items() if key in own and (own[key].shape == value.shape or key == input_weight)
    }
    wrong = [key for key in state if key not in fits]
    # A projection comes whole: a batch norm without its statistics would pass for a layer norm
    complete = ("projections.",) if any(key.startswith("projections.") for key in state) else ()
    missing = [key for key in own if key not in state and (key.startswith(complete) or not _may_be_missing(key))]
    if wrong or missing:
        other_norm = any("projections." in key and "running_" in key for key in (*wrong, *missing))
        raise ValueError(
            f"{len(missing)} tensors missing (first: {missing[:3]}), "
            f"{len(wrong)} unknown or of another shape (first: {wrong[:3]})"
            + ("; the projections have another norm, see model.projection_norm" if other_norm else "")
        )
    log.info("weights: %d tensors given, %d left as initialised", len(state), len(own) - len(state))
    return own | state


def _from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released code's names -> original ConvNeXt's or timm's ResNet's, and ours for the classification."""
    # The released ResNet projects to a quarter of the width with batch norms; the released ConvNeXt as we do
    other_projections = any("visual_proj_heads" in key and "running_mean" in key for key in state)
    renamed, left_out = {}, []
    for key, value in state.items():
        if any(part in key for part in _RELEASED_ONLY) or key.startswith(("fc.", "cls.logit_scale.")):
            left_out.append(key)
        elif projection := _RELEASED_PROJECTION.match(key):
            if other_projections:
                left_out.append(key)
                continue
            stage, layer = map(int, projection.groups())
            renamed[f"projections.{stage + 1}.{layer + 2}.{key[projection.end() :]}"] = value
        else:
            key = key.replace("cls.class_token_embedding.", "class_embeddings.")
            key = key.replace("cls.logit_scale", "class_embeddings.log_inverse_temperature")
            renamed[re.sub(r"\.(dwconv|conv2)\.conv\.", r".\1.", key)] = value
    if left_out:
        kinds = sorted({re.sub(r"\d+", "*", key.rpartition(".")[0]) for key in left_out})
        log.warning(
            "%d of the released code's %d tensors have no counterpart here and were left out (%s): offsets and merged "
            "contexts start anew, so the model computes its static part only and must be trained again",
            len(left_out),
            len(state),
            ", ".join(kinds),
        )
    return renamed


def _is_other_classifier(key: str, value: Tensor, own: dict[str, Tensor]) -> bool:
    """A classifier for another number of classes: to be learned anew."""
    is_classifier = key.startswith(("head.", "fc.", "classifier.", "class_embeddings.weight"))
    return is_classifier and key in own and own[key].shape != value.shape


def _may_be_missing(key: str) -> bool:
    return key.startswith(("head.", "fc.", "classifier.")) or any(part in key for part in _CONTEXTUAL_ONLY)

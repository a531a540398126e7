"""The pixels that weights were trained on: timm publishes them beside its weights, as a model's `pretrained_cfg`."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from contextual_cnn.contracts import TimmModel
from contextual_cnn.runs.checkpoint import step_of

log = logging.getLogger(__name__)


def warn_of_other_pixels(model: nn.Module, weights: str | None, data: Mapping[str, Any]) -> None:
    """One warning where the data feed loaded weights other pixels than timm's `pretrained_cfg` asks for.

    A wrong mean costs ten points of accuracy, and no error: tf_efficientnet_lite0 has 88.3 % of 1,000 images right with
    its own mean and std, 77.9 % with ImageNet's.

    Args:
        weights: the file that was loaded, or None. What a run of this program was fed its own config tells, not timm.
        data: mean, std, crop_pct, interpolation.
    """
    if weights is None or _is_of_a_run(Path(weights).expanduser()):
        return
    asked = cast(TimmModel, model).pretrained_cfg
    differing = [key for key, value in data.items() if key in asked and _plain(asked[key]) != _plain(value)]
    differences = [f"{key} {_typed(data[key])} instead of {_typed(asked[key])}" for key in differing]
    if asked.get("crop_mode", "center") != "center":
        differences.append(f"crop_mode center instead of {asked['crop_mode']} (not offered here)")
    if differences:
        overrides = " ".join(f"data.{key}={_typed(asked[key])}" for key in differing)
        log.warning(
            "data gives other pixels than timm's weights of %s were trained on: %s. To feed them their own: %s",
            *(asked["architecture"], ", ".join(differences), overrides or "there is no override"),
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _typed(value: Any) -> str:
    """As it is typed on the command line: [0.5,0.5,0.5]."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _is_of_a_run(weights: Path) -> bool:
    return weights.is_dir() or step_of(weights) is not None

"""A trained detector again, from a checkpoint; the file is somebody's input."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contextual_cnn.errors import UserError
from contextual_cnn.models.detector import build_detector
from contextual_cnn.models.mask_rcnn import Detector
from contextual_cnn.models.restore import restore_tensors
from contextual_cnn.runs.checkpoint_entries import choose_weights, require_entries
from contextual_cnn.schema import Group, check_config
from contextual_cnn.settings.coco import CocoSettings
from contextual_cnn.settings.detector import DetectorSettings
from contextual_cnn.settings.keys import overridden
from contextual_cnn.settings.model import ModelSettings

_SCHEMA = {"model": Group(ModelSettings), "detector": Group(DetectorSettings), "data": Group(CocoSettings)}


@dataclass(frozen=True)
class TrainedDetector:
    """A detector and what it was trained with.

    model: on the CPU, in eval mode.
    weights: "raw" or "ema".
    settings: of its backbone.
    data: of its training, with what the caller has overridden.
    differences: what of that makes other images.
    has_classes: whether the context's classes came with weights; without, nothing has taught them.
    """

    model: Detector
    weights: str
    path: Path
    step: int
    classes: tuple[str, ...]
    settings: ModelSettings
    data: CocoSettings
    differences: dict[str, Any]
    has_classes: bool


def restore_detector(
    path: Path, state: Mapping[str, Any], weights: str = "auto", data: Mapping[str, Any] | None = None
) -> TrainedDetector:
    """The detector of a file that has been read.

    Args:
        weights: "raw", "ema", or "auto" for those that made the checkpoint the best.
        data: what is to differ from the training's data.

    Raises:
        UserError: a config that is refused, weights that it does not hold, data keys that scenes do not have.
    """
    require_entries(state, path, "config", "classes", "best", "ema")
    name, tensors = choose_weights(state, weights)
    config, classes = state["config"], tuple(state["classes"])
    try:
        check_config({group: config.get(group) for group in _SCHEMA}, _SCHEMA)
        settings = replace(ModelSettings(**config["model"]), weights=None)  # a path in a file is not followed
        detector = DetectorSettings(**config["detector"])
        own = CocoSettings(**config["data"])

        def build() -> Detector:
            return build_detector(settings, detector, len(classes))

        model = restore_tensors(build, tensors, settings.name)
    except UserError as error:  # of keys that are in the file
        raise UserError(
            f"{path}: {error.cause}", "use another checkpoint, or the version that wrote this one"
        ) from error
    evaluated = overridden(own, "data", data or {})
    return TrainedDetector(
        model=model.eval(),
        weights=name,
        path=path,
        step=state["step"],
        classes=classes,
        settings=settings,
        data=evaluated,
        differences=_differences(own, evaluated),
        has_classes=config["model"]["weights"] is not None or detector.context == "multilabel",
    )


def _differences(own: CocoSettings, evaluated: CocoSettings) -> dict[str, Any]:
    roots = {name: str(Path(data.root).expanduser().absolute()) for name, data in (("own", own), ("now", evaluated))}
    other = {"root": roots["now"]} if roots["now"] != roots["own"] else {}
    return other | {key: value for key, value in evaluated.views.items() if value != own.views[key]}

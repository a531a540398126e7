"""A detector from its config: a backbone, optionally from given weights, or all of it from another detector's."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from contextual_cnn.errors import UserError
from contextual_cnn.models.build import build_model
from contextual_cnn.models.contextual_model import ContextualModel
from contextual_cnn.models.mask_rcnn import STRIDES, Detector
from contextual_cnn.models.weights import classes_of_weights, detector_weights
from contextual_cnn.settings.detector import DetectorSettings
from contextual_cnn.settings.model import ModelSettings

log = logging.getLogger(__name__)

_PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")  # a row for each class


def build_detector(model: ModelSettings, settings: DetectorSettings, num_classes: int) -> Detector:
    """Mask R-CNN over the backbone of these settings.

    Args:
        model: its number of classes is of the context. Its weights are of a classifier, or of a detector: then all
            that has the same shape is taken over, predictors of other classes begin anew.
        num_classes: of objects, the background not counted.

    Raises:
        UserError: as `build_model`; weights of neither.
    """
    from_detector = detector_weights(Path(model.weights)) if model.weights is not None else None
    body = build_model(model if from_detector is None else replace(model, weights=None))
    if settings.context == "multilabel":
        _check_teachable(body, num_classes)
    elif model.weights is not None and isinstance(body, ContextualModel):
        _check_table(model, body)
    detector = Detector(body, num_classes, settings)
    if from_detector is not None:
        _take_over(detector, from_detector)
    return detector


@torch.inference_mode()
def check_strides(detector: Detector) -> None:
    """Raises UserError for maps that are not at 1/4 to 1/32 of an image: boxes would be pooled from wrong places."""
    side, was_training = 2 * STRIDES[-1], detector.training
    maps = detector.eval().backbone.maps(
        torch.zeros(1, 3, side, side)
    )  # timm's own list of strides knows no patch_size
    detector.train(was_training)
    strides = [side // x.shape[-1] for x in maps]
    if strides != list(STRIDES):
        raise UserError(
            f"the backbone has maps at strides {strides}, a detector needs {list(STRIDES)}",
            "another model, or model.timm_options without output_stride",
        )


def _check_teachable(body: nn.Module, num_classes: int) -> None:
    """Raises UserError for a body that has nothing to be taught, or not for these classes."""
    if not isinstance(body, ContextualModel):
        raise UserError("detector.context=multilabel: a plain backbone has no context", "detector.context=frozen")
    if body.num_classes != num_classes:
        raise UserError(
            f"model.num_classes={body.num_classes}, but detector.context=multilabel is of the {num_classes} classes of "
            "the data",
            "model.num_classes=null",
        )
    if body.selection == "reduce":
        raise UserError(
            "model.selection=reduce keeps one image's classes from another stage, and an image here has several",
            "model.selection=rerank",
        )


def _check_table(model: ModelSettings, body: ContextualModel) -> None:
    """Raises UserError where the weights' class table has not been taken over: nothing here would teach a new one."""
    assert model.weights is not None
    found = classes_of_weights(model.weights)
    if found is None:
        log.warning("%s is of a plain model: the context is of random classes, which nothing teaches", model.weights)
    elif found != body.num_classes:
        raise UserError(
            f"model.num_classes={body.num_classes}, but the context of {model.weights} is of {found} classes",
            "model.num_classes=null takes the number from the weights",
        )


def _take_over(detector: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Raises UserError for weights of another backbone."""
    own = detector.state_dict()
    fits = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    other = [name for name in own if name not in fits and not name.startswith(_PREDICTORS)]
    if other:
        raise UserError(
            f"model.weights: the detector has other tensors than this one: {len(other)} missing or of another shape "
            f"(first: {other[:3]})",
            "use a detector of the same model and detector groups",
        )
    log.info("weights: %d tensors of a detector given, %d left as initialised", len(fits), len(own) - len(fits))
    detector.load_state_dict(own | fits)

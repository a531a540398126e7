"""The keys of conf/detector/: what makes a detector of a backbone."""

import math
from dataclasses import dataclass
from typing import Literal

from contextual_cnn.errors import UserError
from contextual_cnn.settings.keys import may_change

_LARGEST = 2**14


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """Mask R-CNN over a feature pyramid.

    context: what of a contextual backbone's classification is trained. Nothing in a detector teaches it: a shortlist is
        a discrete choice, so that projections and temperature have no gradient. "frozen" keeps them and the class
        table as model.weights brought them, "embeddings" trains the table through the contexts. "multilabel" (ours)
        teaches all of it, with a new table of the detector's own classes: after each stage, which of them are in the
        image.
    context_loss: weight of what "multilabel" adds to the loss, the sum over the stages.
    norm_outputs: a layer norm over each map that the backbone hands to the pyramid (Swin, ConvNeXt).
    fpn_channels: of the pyramid and of the mask head.
    head_width: of the box head's two layers.
    anchor_size: side of the smallest anchors in pixels; each of the pyramid's five levels doubles it.
    rpn_samples, roi_samples: anchors and proposals of an image that its losses are of.
    proposals: of an image that are kept in training and in evaluation.
    score: detections below it are left out. nms: the overlap above which the better one of a class stays alone.
    detections: of an image at most.
    """

    context: Literal["frozen", "embeddings", "multilabel"] = "frozen"
    context_loss: float = 0.15
    norm_outputs: bool = True
    fpn_channels: int = 256
    head_width: int = 1024
    anchor_size: int = 32
    rpn_samples: int = 256
    roi_samples: int = 512
    proposals: int = 1000
    score: float = may_change(0.05)
    nms: float = may_change(0.5)
    detections: int = may_change(100)

    def __post_init__(self) -> None:
        for key in (
            "fpn_channels", "head_width", "anchor_size", "rpn_samples", "roi_samples", "proposals", "detections",
        ):  # fmt: skip
            if not 1 <= getattr(self, key) <= _LARGEST:
                raise UserError(
                    f"detector.{key} must be from 1 to {_LARGEST}, got {getattr(self, key)}", f"detector.{key}=100"
                )
        if not 0 < self.context_loss < math.inf:
            raise UserError(
                f"detector.context_loss must be above 0 and finite, got {self.context_loss}",
                "detector.context_loss=0.15",
            )
        for key in ("score", "nms"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(
                    f"detector.{key} is a share from 0 to 1, got {getattr(self, key)}", f"detector.{key}=0.5"
                )

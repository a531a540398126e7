"""Mask R-CNN (He et al., 2017) over any backbone of four stages: torchvision's, with a pyramid of our own.

Shapes: B images, padded to one size H W; n objects of an image, N classes beside the background, which is class 0.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from contextual_cnn.contracts import STAGES
from contextual_cnn.models.contextual_model import ContextualModel
from contextual_cnn.models.valid_mean import ValidPart
from contextual_cnn.settings.detector import DetectorSettings

STRIDES = (4, 8, 16, 32)  # of the stages; images are padded to a multiple of the last
_LEVELS = 5
_CANONICAL_SIDE, _CANONICAL_LEVEL = 224, 4  # a box of ImageNet's size is pooled from the level that ImageNet's head saw
_MASK_SAMPLES, _BOX_SAMPLES = 14, 7  # along a side of a pooled box

Detections = list[dict[str, Tensor]]


class Detector(MaskRCNN):
    """Losses in training; boxes, classes, scores and masks in evaluation.

    Boxes are (left, top, right, bottom) in pixels of the padded image. They are float32 under bfloat16 autocast too:
    torchvision gives anchors and boxes the type of what it computes them from, and bfloat16 makes 1200 of 1203.

    Args:
        body: a classifier of timm's or ours; what follows its last stage is removed.
        num_classes: N.
    """

    def __init__(self, body: nn.Module, num_classes: int, settings: DetectorSettings) -> None:
        teaches = settings.context == "multilabel"
        pyramid = Pyramid(body, settings.fpn_channels, settings.norm_outputs, keep_head=teaches)
        channels, levels = settings.fpn_channels, list(map(str, range(STAGES)))
        super().__init__(
            pyramid,
            rpn_anchor_generator=AnchorGenerator(
                tuple((settings.anchor_size * 2**level,) for level in range(_LEVELS)), ((0.5, 1.0, 2.0),) * _LEVELS
            ),
            rpn_pre_nms_top_n_train=2000,
            rpn_pre_nms_top_n_test=1000,
            rpn_post_nms_top_n_train=settings.proposals,
            rpn_post_nms_top_n_test=settings.proposals,
            rpn_batch_size_per_image=settings.rpn_samples,
            box_batch_size_per_image=settings.roi_samples,
            box_score_thresh=settings.score,
            box_nms_thresh=settings.nms,
            box_detections_per_img=settings.detections,
            box_roi_pool=AlignedPool(levels, _BOX_SAMPLES, 0),
            box_head=TwoMLPHead(channels * _BOX_SAMPLES**2, settings.head_width),
            box_predictor=FastRCNNPredictor(settings.head_width, num_classes + 1),
            mask_roi_pool=AlignedPool(levels, _MASK_SAMPLES, 0),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
        )
        del self.transform  # the loader has done it
        self.num_classes = num_classes
        self.context_loss = settings.context_loss if teaches else None
        for module in (self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            module.register_forward_hook(_as_float32)
        self._kept = _freeze(body, settings.context)
        self._valid = ValidPart()
        if isinstance(body, ContextualModel):
            body.take_means_of(self._valid)

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | Detections:
        """(B, 3, H, W) normalised images -> losses by name, or each image's detections.

        Args:
            sizes: height and width of the images within the padding.
            targets: in training, of each image boxes (n, 4), labels (n,) from 1 on and masks (n, H, W) uint8; n may
                be 0.

        Returns:
            Scalars; or of each image boxes (n, 4), labels (n,), scores (n,) and masks (n, 1, 28, 28), the probability
            of each part of a box to belong to the object.
        """
        self._valid.tell(sizes, (images.shape[2], images.shape[3]))
        pyramid = cast(Pyramid, self.backbone)
        context: dict[str, Tensor] = {}
        if self.context_loss is not None and self.training and targets is not None:
            maps, logits = cast(ContextualModel, self.body).forward_staged_maps(images)
            context = {"loss_context": self.context_loss * _multilabel_loss(logits, targets)}
        else:
            maps = pyramid.maps(images)
        features = pyramid.join(maps)
        of_images = ImageList(images, list(sizes))
        given = list(targets) if targets is not None else None
        proposals, of_proposals = self.rpn(of_images, features, given)
        detections, of_boxes = self.roi_heads(features, proposals, of_images.image_sizes, given)
        return of_proposals | of_boxes | context if self.training else cast(Detections, detections)

    @property
    def body(self) -> nn.Module:
        return cast(nn.Module, self.backbone.body)

    def train(self, mode: bool = True) -> "Detector":
        """As ever, but batch norms keep their statistics: a process has one or two images."""
        super().train(mode)
        for module in getattr(self, "_kept", ()):
            module.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """What the body's own optimizer spares."""
        spared = self.body.no_weight_decay() if hasattr(self.body, "no_weight_decay") else set()  # type: ignore[operator]
        return {f"backbone.body.{name}" for name in spared}

    def get_classifier(self) -> nn.Module:
        """What is trained with the classifier's learning rate."""
        return cast(nn.Module, self.roi_heads.box_predictor)


class Pyramid(nn.Module):
    """A body's four maps, normalised, as a feature pyramid of five levels: the maps at 1/4 to 1/32, and 1/64."""

    def __init__(self, body: nn.Module, channels: int, norm_outputs: bool, keep_head: bool = False) -> None:
        super().__init__()
        widths = [info["num_chs"] for info in list(cast(Any, body).feature_info)[-STAGES:]]
        cast(Any, body).prune_intermediate_layers(STAGES, prune_head=not keep_head)
        self.body = body
        self.norms = nn.ModuleList(LayerNorm2d(width) if norm_outputs else nn.Identity() for width in widths)
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> by level ("0" to "3", "pool") maps (B, C, H/4, W/4) to (B, C, H/64, W/64), float32."""
        return self.join(self.maps(images))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The body's own, at 1/4 to 1/32."""
        return cast(Any, self.body).forward_intermediates(images, indices=STAGES, intermediates_only=True)

    def join(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The pyramid of these maps."""
        normed = {str(level): norm(x) for level, (norm, x) in enumerate(zip(self.norms, maps, strict=True))}
        return {level: x.float() for level, x in self.fpn(normed).items()}


class AlignedPool(MultiScaleRoIAlign):
    """RoIAlign from the level of a box's size, as Detectron2 and mmdetection have it.

    torchvision's own shifts every box by half a pixel of its map (its `aligned=False`) and takes four samples of each
    part, however large the box. Here the samples are as many as the part has pixels.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps by level, (n, 4) boxes of each image -> (sum of n, C, S, S)."""
        maps = [x[name] for name in self.featmap_names]
        scales = [1 / stride for stride in STRIDES]
        mapper = LevelMapper(2, 1 + len(maps), _CANONICAL_SIDE, _CANONICAL_LEVEL)
        levels = mapper(boxes)
        number = torch.cat([torch.full_like(of[:, :1], i) for i, of in enumerate(boxes)])
        rois = torch.cat([number, torch.cat(boxes)], dim=1)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (features, scale) in enumerate(zip(maps, scales, strict=True)):
            (chosen,) = torch.where(levels == level)
            part = roi_align(
                features, rois[chosen], self.output_size, scale, self.sampling_ratio, aligned=True
            )  # of every level, so that each has a gradient whatever boxes there are
            pooled = pooled.index_put((chosen,), part.to(pooled.dtype))
        return pooled


def _freeze(body: nn.Module, context: str) -> list[nn.Module]:
    """Stops the training of what nothing teaches, and of the statistics of too few images.

    Returns:
        The modules that stay in eval mode: batch norms, and all of the projections.
    """
    kept: list[nn.Module] = [module for module in body.modules() if isinstance(module, _BatchNorm)]
    for module in kept:
        module.is_frozen = True  # type: ignore[assignment] # for the training loop, which has ways of its own with them
    if isinstance(body, ContextualModel) and context != "multilabel":
        body.projections.requires_grad_(False)
        body.class_embeddings.requires_grad_(False)
        body.class_embeddings.weight.requires_grad_(context == "embeddings")
        kept.append(body.projections)
    return kept


def _multilabel_loss(logits: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Tensor:
    """Of each stage's (B, N) logits, the mean binary cross-entropy of which classes an image has; their sum."""
    present = torch.zeros_like(logits[-1])
    for row, target in zip(present, targets, strict=True):
        row[target["labels"] - 1] = 1
    losses = [binary_cross_entropy_with_logits(of_stage, present) for of_stage in logits]
    return torch.stack(losses).sum()


def _as_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map(lambda value: value.float() if isinstance(value, Tensor) else value, outputs)

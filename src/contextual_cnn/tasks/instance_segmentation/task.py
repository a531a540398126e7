"""Instance segmentation as the training loop sees it (section 4.2, table 3)."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.detection.annotations import CocoImages
from contextual_cnn.data.detection.coco_data import CocoData
from contextual_cnn.data.detection.coco_loader import Scenes
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.models.contextual_model import ContextualModel
from contextual_cnn.models.detector import build_detector, check_strides
from contextual_cnn.runs.agreement import digest
from contextual_cnn.settings.trainer import TrainerSettings
from contextual_cnn.task import Call, Metric, Outcome, Position
from contextual_cnn.tasks.instance_segmentation.measure import CocoEvaluation
from contextual_cnn.tasks.instance_segmentation.settings import InstanceSegmentationSettings
from contextual_cnn.tasks.listed import ListedTask

log = logging.getLogger(__name__)

# torchvision's names of the losses -> ours, in the order in which they are logged
_LOSSES = {
    "loss_objectness": "loss_rpn_class",
    "loss_rpn_box_reg": "loss_rpn_box",
    "loss_classifier": "loss_class",
    "loss_box_reg": "loss_box",
    "loss_mask": "loss_mask",
    "loss_context": "loss_context",  # of detector.context=multilabel
}


class InstanceSegmentation(ListedTask):
    """Mask R-CNN: the sum of its five losses, judged by COCO's average precision of masks."""

    best = Metric("mask_ap", "mask AP")
    settings: InstanceSegmentationSettings

    def __init__(self, settings: InstanceSegmentationSettings, data: CocoData) -> None:
        self.settings, self.data = settings, data
        super().__init__(data, {split: digest_listing(source) for split, source in data.sources.items()})

    def build_model(self) -> nn.Module:
        """On the CPU."""
        torch.backends.cudnn.benchmark = False  # it would try all algorithms again for every new size
        settings = self.settings
        model = build_detector(settings.model, settings.detector, len(self.data.classes))
        check_strides(model)
        is_taught = settings.detector.context == "multilabel" or settings.model.weights is not None
        if isinstance(model.body, ContextualModel) and not is_taught:
            log.warning(
                "the context is of random classes, which nothing in a detector teaches: model.weights=outputs/NAME of "
                "a contextual classifier makes it one"
            )
        return model

    def check_model(self, model: nn.Module, settings: TrainerSettings, plan: BatchPlan) -> None:
        """Raises UserError where the whole model would be compiled: its shapes change from batch to batch."""
        if settings.compile is not False:
            raise UserError(
                f"trainer.compile={settings.compile}: a detector sees another size with every batch, and would be "
                "compiled again and again",
                "trainer.compile=false",
            )

    def batches(self, position: Position) -> Iterator[Scenes]:
        """Images of one batch's size and what is in them, from a position on."""
        return self.data.train_batches(
            position.plan, self.settings.augment, position.seed, position.world, position.step
        )

    def forward(self, call: Call, batch: Scenes) -> Outcome:
        """The sum of the losses, and each."""
        losses = call(batch.images, batch.sizes, batch.targets)
        total = torch.stack(list(losses.values())).sum()
        return Outcome(total, {ours: losses[name].detach() for name, ours in _LOSSES.items() if name in losses})

    def evaluation(self, world: World) -> CocoEvaluation:
        """Of the val split."""
        return CocoEvaluation(self.data, world)

    def evidence(self, batch: Scenes) -> dict[str, Any]:
        """What is kept of a micro-batch whose loss is not finite."""
        targets = [{name: value.cpu() for name, value in of.items()} for of in batch.targets]
        names = [self.data.sources["train"].name(index) for index in batch.indices]
        return {"images": batch.images.cpu(), "sizes": batch.sizes, "targets": targets, "names": names}

    def describe(self, model: nn.Module) -> str:
        """Name, size, and what is kept of the context."""
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        text = (
            f"Mask R-CNN on {self.settings.model.name}: {millions:.2f} M parameters, {len(self.data.classes)} classes"
        )
        is_contextual = isinstance(getattr(model, "body", None), ContextualModel)
        return f"{text}, context {self.settings.detector.context}" if is_contextual else text

    def describe_step(self, metrics: Mapping[str, float]) -> str:
        """The losses of a log step."""
        there = [name for name in _LOSSES.values() if name in metrics]
        parts = " ".join(f"{name.removeprefix('loss_')} {metrics[name]:.2f}" for name in there)
        return f"loss {metrics['loss']:.3f} ({parts})"

    def describe_evaluation(self, reports: Mapping[str, Mapping[str, float]]) -> str:
        """AP of boxes and masks for each set of weights."""
        return ", ".join(
            f"{name} box AP {report['box_ap']:.1f} mask AP {report['mask_ap']:.1f} (AP50 {report['mask_ap50']:.1f})"
            for name, report in reports.items()
        )


def digest_listing(source: CocoImages) -> str:
    """Of names, order and all annotations of a split; not of the images' contents, nor of where they lie."""
    return digest(*(array.tobytes() for _, array in sorted(source.arrays().items())))

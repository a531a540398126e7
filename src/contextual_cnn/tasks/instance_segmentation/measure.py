"""What an evaluation finds out about a detector: COCO's average precision, by pycocotools, of all ranks together."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from contextual_cnn.data.detection.annotations import CocoImages, ground_truth
from contextual_cnn.data.detection.coco_data import CocoData
from contextual_cnn.data.detection.coco_loader import Scenes
from contextual_cnn.data.detection.masks import import_mask
from contextual_cnn.distributed import World, all_reduce_sum, gather_on_main
from contextual_cnn.task import Call

log = logging.getLogger(__name__)

# Of pycocotools' twelve figures, by their places
FIGURES = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8}
_ALWAYS = ("ap", "ap50")  # there is always a best checkpoint
_KINDS = {"box": "bbox", "mask": "segm"}
_INSIDE = 0.5  # the probability from which on a pixel belongs to the object
_AT_ONCE = 16  # masks of the image's size

# What has been found: of an image's index, in COCO's form
Found = list[dict[str, Any]]


class Answer(NamedTuple):
    """COCO's figures in percent, by name; those that the data say nothing about are missing.

    by_class: the same of box and mask AP, (classes,) each, NaN where a class has no objects.
    found: all detections, in COCO's form.
    """

    figures: dict[str, float]
    by_class: dict[str, np.ndarray]
    found: Found


class CocoEvaluation:
    """The val split of some data, as often as it is asked for.

    Args:
        observe: called on rank 0 with each answer.
    """

    def __init__(self, data: CocoData, world: World, observe: Callable[[Answer], None] | None = None) -> None:
        self._source, self._world, self._observe = data.sources["val"], world, observe
        self._truth: dict[str, Any] | None = None
        self.batches: Any = data.evaluation_batches(world)
        self.samples: int = self.batches.images

    def measure(self, model: nn.Module) -> "AveragePrecision":
        if self._world.is_main and self._truth is None:
            self._truth, problems = ground_truth(self._source)
            for problem in problems[:10]:
                log.warning("left out of the evaluation: %s", problem)
            if problems[10:]:
                log.warning("and %d annotations more", len(problems) - 10)
        return AveragePrecision(self._source, self._world, self._truth, self._observe)


class AveragePrecision:
    """Detections of one model, in the images' own pixels. The arguments are those of `CocoEvaluation`.

    truth: what is annotated, on rank 0.
    """

    def __init__(
        self,
        source: CocoImages,
        world: World,
        truth: dict[str, Any] | None,
        observe: Callable[[Answer], None] | None = None,
    ) -> None:
        self._source, self._world, self._truth, self._observe = source, world, truth, observe
        self._found: list[tuple[int, Found]] = []
        self._images = self._bad_images = 0

    def add(self, call: Call, batch: Scenes) -> None:
        """Shows the model a batch. It waits for the device: masks become run lengths here."""
        self._images += batch.size
        self._bad_images += batch.usable.count(False)
        answers = call(batch.images, batch.sizes)
        for index, size, usable, answer in zip(batch.indices, batch.sizes, batch.usable, answers, strict=True):
            if usable:
                self._found.append((index, self._in_coco_form(index, size, answer)))

    def report(self) -> dict[str, float]:
        """box_ap, mask_ap and the like in percent, images, and bad_images (of them; nothing is found in them)."""
        parts = gather_on_main(self._found)
        figures: dict[str, float] = {}
        names = [f"{kind}_{figure}" for kind in _KINDS for figure in FIGURES]
        if parts is not None:
            assert self._truth is not None  # on rank 0
            in_order = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
            answer = judge(self._truth, [one for _, found in in_order for one in found])
            figures = answer.figures
            if self._observe is not None:
                self._observe(answer)
        counts = [self._images, self._bad_images]
        values = torch.tensor(
            [*counts, *(figures.get(name, 0.0) for name in names), *(float(name in figures) for name in names)],
            dtype=torch.float64,
            device=self._world.device,
        )
        images, bad_images, *rest = all_reduce_sum(values).tolist()
        known = {name: value for name, value, there in zip(names, rest, rest[len(names) :], strict=False) if there}
        return known | {"images": int(images), "bad_images": int(bad_images)}

    def _in_coco_form(self, index: int, size: tuple[int, int], answer: dict[str, Tensor]) -> Found:
        height, width = self._source.size(index)
        boxes, masks = scaled(answer, size, (height, width))
        lefts_tops, rights_bottoms = boxes.split(2, dim=1)
        image, categories = int(self._source.targets[index]), self._source.category_ids
        return [
            {
                "image_id": image,
                "category_id": int(categories[label - 1]),
                "bbox": box,
                "score": score,
                "segmentation": packed(mask),
            }
            for label, box, score, mask in zip(
                answer["labels"].tolist(),
                torch.cat([lefts_tops, rights_bottoms - lefts_tops], dim=1).tolist(),
                answer["scores"].tolist(),
                pasted(masks, boxes, height, width),
                strict=True,
            )
        ]


def scaled(answer: dict[str, Tensor], size: tuple[int, int], to: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) in another size of the same image, and masks (n, 1, 28, 28); on the CPU."""
    boxes = answer["boxes"].cpu()
    factors = boxes.new_tensor([to[1] / size[1], to[0] / size[0]]).repeat(2)
    return boxes * factors, answer["masks"].cpu().float()


def pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> Iterable[np.ndarray]:
    """(n, 1, 28, 28) probabilities within boxes -> (H, W) bool, one after the other."""
    for begin in range(0, len(boxes), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        yield from (paste_masks_in_image(masks[part], boxes[part], (height, width))[:, 0] > _INSIDE).numpy()


def packed(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> COCO's compressed run lengths, as JSON takes them."""
    lengths = import_mask().encode(np.asfortranarray(mask, dtype=np.uint8))
    return lengths | {"counts": lengths["counts"].decode("ascii")}


def judge(truth: dict[str, Any], found: Found) -> Answer:
    """pycocotools' figures of all that was found, in the images' order.

    Args:
        truth: see `ground_truth`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    figures: dict[str, float] = {}
    by_class: dict[str, np.ndarray] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = COCO()
        annotated.dataset = truth
        annotated.createIndex()
        for kind, name in _KINDS.items():
            detected = COCO()
            detected.dataset = {**truth, "annotations": _as_annotations(found, kind)}
            detected.createIndex()
            evaluation = COCOeval(annotated, detected, name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for figure, place in FIGURES.items():
                value = float(evaluation.stats[place])  # -1: no such objects
                if value >= 0 or figure in _ALWAYS:
                    figures[f"{kind}_{figure}"] = 100 * max(0.0, value)
            by_class[kind] = 100 * _mean(evaluation.eval["precision"][:, :, :, 0, -1])
    return Answer(figures, by_class, found)


def _mean(precision: np.ndarray) -> np.ndarray:
    """(thresholds, recalls, classes), -1 where a class has no objects -> (classes,), NaN there."""
    has_objects = (precision >= 0).all(axis=(0, 1))
    return np.where(has_objects, precision.mean(axis=(0, 1)), np.nan)


def _as_annotations(found: Found, kind: str) -> list[dict[str, Any]]:
    """Small, medium and large are told apart by the area of the box for boxes, of the mask for masks."""
    measure = import_mask().area
    return [
        one
        | {
            "id": number,
            "iscrowd": 0,
            "area": one["bbox"][2] * one["bbox"][3] if kind == "box" else float(measure(one["segmentation"])),
        }
        for number, one in enumerate(found, start=1)
    ]

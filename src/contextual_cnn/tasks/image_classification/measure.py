"""What an evaluation finds out about a classifier: hits, recall of the shortlists, loss; every image counted once."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contextual_cnn.contracts import Batch, StagedScores, is_considered, stage_name
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.distributed import World
from contextual_cnn.engine.sums import Sums
from contextual_cnn.models import ContextualModel
from contextual_cnn.task import Call
from contextual_cnn.tasks.image_classification.hits import stage_hits, top_hits

Observe = Callable[[Tensor, Tensor], None]


class ClassificationEvaluation:
    """The val split of some data, as often as it is asked for.

    Args:
        among: (N,) bool, the classes that the final prediction is made among; None is all. The shortlists of the
            stages are the model's own in any case.
        observe: called with the targets (B,) and the final logits (B, N) of each batch, in the share's order.
    """

    def __init__(
        self, data: ImageData, world: World, among: Tensor | None = None, observe: Observe | None = None
    ) -> None:
        self._world, self._among, self._observe = world, among, observe
        self.batches: Any = data.evaluation_batches(world)
        self.samples: int = self.batches.images

    def measure(self, model: nn.Module) -> "Accuracy":
        return Accuracy(model, self._world, self._among, self._observe)


class Accuracy:
    """Counts of one model on the device. The arguments are those of `ClassificationEvaluation`."""

    def __init__(
        self, model: nn.Module, world: World, among: Tensor | None = None, observe: Observe | None = None
    ) -> None:
        self._is_staged = isinstance(model, ContextualModel)
        self._is_told = isinstance(model, ContextualModel) and model.context_of == "told"
        self._among, self._observe = among, observe
        self._sums = Sums(world.device, _names(model))

    def add(self, call: Call, batch: Batch) -> None:
        """Shows the model a batch."""
        told = {"told": batch.targets} if self._is_told else {}
        scores = StagedScores.of(call(batch.images, staged=True, **told) if self._is_staged else call(batch.images))
        logits = scores.logits[-1]
        if self._among is not None:
            logits = logits.masked_fill(~self._among, -torch.inf)
        if self._observe is not None:
            self._observe(batch.targets, logits)
        self._sums.add(
            images=batch.size,
            bad_images=(batch.targets < 0).sum(),
            **_loss(logits, batch.targets),
            **top_hits(logits, batch.targets),
            **stage_hits(scores, batch.targets),
        )

    def report(self) -> dict[str, float]:
        """top1, top5, recall_stageS in percent, loss, images, and bad_images (of them; they count as wrong).

        The loss is the cross-entropy of the final logits, over the images whose class no stage has dropped.
        """
        total = self._sums.read()
        images, bad_images = int(total.pop("images")), int(total.pop("bad_images"))
        loss = total.pop("loss") / max(1.0, total.pop("considered"))
        shares = {name: 100 * count / max(1, images) for name, count in total.items()}
        return shares | {"loss": loss, "images": images, "bad_images": bad_images}


def _loss(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Sum and number of the losses that are not infinite because the class has been dropped, bad images left out."""
    classes = targets.clamp(min=0)  # a bad image has none
    considered = is_considered(logits).gather(1, classes.unsqueeze(1)).squeeze(1) & (targets >= 0)
    losses = F.cross_entropy(logits.float(), classes, reduction="none")
    return {"loss": losses.masked_fill(~considered, 0.0).sum(), "considered": considered.sum()}


def _names(model: nn.Module) -> Iterable[str]:
    """What is summed for a model; a rank may have no image at all."""
    stages = model.shortlist_sizes if isinstance(model, ContextualModel) else ()
    return [
        "images",
        "bad_images",
        "loss",
        "considered",
        "top1",
        "top5",
        *(stage_name("recall", stage) for stage in stages),
    ]

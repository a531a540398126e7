"""Evaluation, used after each epoch and by evaluate.py: counts over all ranks, every image once."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from contextual_cnn.contracts import Batch, StagedScores, is_considered, stage_name
from contextual_cnn.distributed import World
from contextual_cnn.engine.metrics import Sums, stage_hits, top_hits
from contextual_cnn.models import ContextualModel


class EvaluationStopped(Exception):
    """A rank was asked to stop; raised on all of them, with nothing counted."""


@torch.inference_mode()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[Batch],
    images: int,
    world: World,
    autocast: AbstractContextManager,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    among: torch.Tensor | None = None,
    observe: Callable[[str, torch.Tensor, torch.Tensor], None] = lambda name, targets, logits: None,
) -> dict[str, dict[str, float]]:
    """Several sets of weights (raw, EMA) over one pass of the data.

    Args:
        models: by name, without DDP around them; left in the mode they came in.
        batches: this rank's share.
        images: of the whole split.
        should_stop: looked at after each batch.
        among: (N,) bool, the classes that the final prediction is made among; None is all. The shortlists of the
            stages are the model's own in any case.
        observe: called with a model's name, the targets (B,) and the final logits (B, N) of each batch, in the share's
            order.

    Returns:
        By name: top1, top5, recall_stageS in percent, loss (cross-entropy of the final logits, over the images
        whose class no stage has dropped), images, bad_images (of them; they count as wrong), seconds and
        images_per_second of the whole pass.

    Raises:
        RuntimeError: the ranks together did not count exactly `images`.
        EvaluationStopped: `should_stop` on any rank. The batches are then left in the middle of a pass.
    """
    modes = {name: model.training for name, model in models.items()}
    sums = {name: Sums(world.device, _names(model)) for name, model in models.items()}
    stopped = Sums(world.device, ["ranks"])
    started = time.perf_counter()
    for model in models.values():
        model.eval()
    for batch in batches:
        for name, model in models.items():
            with autocast:
                scores = staged_scores(model, batch.images)
            logits = scores.logits[-1]
            if among is not None:
                logits = logits.masked_fill(~among, -torch.inf)
            observe(name, batch.targets, logits)
            sums[name].add(
                images=len(batch.targets),
                bad_images=(batch.targets < 0).sum(),
                **_loss(logits, batch.targets),
                **top_hits(logits, batch.targets),
                **stage_hits(scores, batch.targets),
            )
        if should_stop():
            stopped.add(ranks=1)
            break
    for name, model in models.items():
        model.train(modes[name])
    if stopped.read()["ranks"]:
        raise EvaluationStopped
    totals = {name: of_model.read() for name, of_model in sums.items()}
    seconds = time.perf_counter() - started
    return {name: _report(total, images, seconds) for name, total in totals.items()}


def staged_scores(model: nn.Module, images: torch.Tensor) -> StagedScores:
    """The scores of every stage whatever the mode; of a model without stages, its logits as the only stage."""
    return StagedScores.of(model(images, staged=True) if isinstance(model, ContextualModel) else model(images))


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum and number of the losses that are not infinite because the class has been dropped, bad images left out."""
    classes = targets.clamp(min=0)  # a bad image has none
    considered = is_considered(logits).gather(1, classes.unsqueeze(1)).squeeze(1) & (targets >= 0)
    losses = F.cross_entropy(logits.float(), classes, reduction="none")
    return {"loss": losses.masked_fill(~considered, 0.0).sum(), "considered": considered.sum()}


def _names(model: nn.Module) -> list[str]:
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


def _report(total: dict[str, float], images: int, seconds: float) -> dict[str, float]:
    counted = int(total.pop("images"))
    if counted != images:
        raise RuntimeError(f"evaluation counted {counted} images of a split of {images}: a defect, please report it")
    bad_images = int(total.pop("bad_images"))
    loss = total.pop("loss") / max(1.0, total.pop("considered"))
    shares = {name: 100 * count / images for name, count in total.items()}
    return shares | {
        "loss": loss,
        "images": images,
        "bad_images": bad_images,
        "seconds": seconds,
        "images_per_second": images / seconds,
    }

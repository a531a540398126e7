"""Classification as the training loop sees it (sections 3.1 and 4.1), of images or of what is made of them."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from contextual_cnn.batch_plan import BatchPlan, NormPlan
from contextual_cnn.contracts import Batch, StagedScores, by_stage
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model, summarize
from contextual_cnn.models.preprocessing import warn_of_other_pixels
from contextual_cnn.runs.agreement import digest
from contextual_cnn.settings.trainer import TrainerSettings
from contextual_cnn.task import Call, Evaluation, Metric, Outcome
from contextual_cnn.tasks.image_classification.hits import labels_of, stage_hits, top_hits
from contextual_cnn.tasks.image_classification.measure import ClassificationEvaluation
from contextual_cnn.tasks.listed import ListedTask

log = logging.getLogger(__name__)


class Classification(ListedTask):
    """Staged scores, and the staged loss; a plain model is its own only stage.

    Args:
        settings: a record with at least a model, data and a loss.
    """

    best = Metric("top1", "top-1")

    def __init__(self, settings: Any, data: ImageData) -> None:
        self.settings, self.data = settings, data
        self._loss = StagedCrossEntropy(settings.loss)
        super().__init__(data, {split: _digest_listing(source) for split, source in data.sources.items()})

    def build_model(self) -> nn.Module:
        """On the CPU."""
        return build_model(self.settings.model)

    def check_model(self, model: nn.Module, settings: TrainerSettings, plan: BatchPlan) -> None:
        """Raises UserError for statistics of one image where a batch norm sees one vector of each."""
        has_vectors = any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
        if has_vectors and NormPlan.make(plan, self.norm_images(settings, plan)).images == 1:
            raise UserError(
                "the model has batch norms over one vector of each image, which cannot learn from one image at a time",
                "trainer.micro_batch_size=2 or more, or layer norms: model.projection_norm=layer "
                "model.context_norm=null model.generator_norm=null",
            )
        warn_of_other_pixels(model, self.settings.model.weights, self.settings.data.pixels)

    def forward(self, call: Call, batch: Batch) -> Outcome:
        """The staged loss, its part of each stage, the hits of the last stage, the recall of each shortlist."""
        labels = labels_of(batch.targets)
        told = {"told": labels} if self.settings.model.context_of == "told" else {}
        scores = StagedScores.of(call(batch.images, **told))
        loss = self._loss(scores, batch.targets)
        hits = top_hits(scores.logits[-1].detach(), labels, ks=(1,)) | stage_hits(scores, labels)
        return Outcome(loss.total, loss.parts, hits)

    def evaluation(self, world: World) -> Evaluation:
        """Of the val split."""
        return ClassificationEvaluation(self.data, world)

    def evidence(self, batch: Batch) -> dict[str, Any]:
        """What is kept of a micro-batch whose loss is not finite."""
        return {"images": batch.images.cpu(), "targets": batch.targets.cpu()}

    def describe(self, model: nn.Module) -> str:
        """Name, size and classes of the model."""
        if self.settings.model.selection == "reduce":
            log.warning(
                "selection=reduce drops classes for good and collapsed to chance from a random start wherever it was "
                "tried (docs/staged-loss.md); watch the recall per stage, or use model.selection=rerank"
            )
        return f"{self.settings.model.name}: {summarize(model)}"

    def describe_step(self, metrics: Mapping[str, float]) -> str:
        """Losses, and recall by stage, of a log step."""
        losses, recalls = by_stage(metrics, "loss"), by_stage(metrics, "recall")
        text = f"loss {metrics['loss']:.3f}"
        if len(losses) > 1:
            text += f" ({_list(losses, '.2f')})"
        return f"{text}, recall {_list(recalls, '.0f')} %" if recalls else text

    def describe_evaluation(self, reports: Mapping[str, Mapping[str, float]]) -> str:
        """Accuracy of each set of weights, recall per stage of the raw ones."""
        parts = [f"{name} top-1 {report['top1']:.2f} top-5 {report['top5']:.2f}" for name, report in reports.items()]
        if recalls := by_stage(reports["raw"], "recall"):
            parts.append(f"recall {_list(recalls, '.0f')} %")
        return ", ".join(parts)

    def remarks(self, model: nn.Module, report: Mapping[str, float]) -> Iterator[str]:
        """A staged loss can fall by losing targets; a shortlist no better than a random one shows it."""
        counts = getattr(model, "shortlist_sizes", {})
        for stage, recall in by_stage(report, "recall").items():
            chance = 100 * counts[stage] / self.data.num_classes
            if recall < 1.1 * chance and chance < 90:
                yield (
                    f"the shortlist after stage {stage} holds the true class in {recall:.1f} % of the val images, "
                    f"a random one would in {chance:.1f} %"
                )


def _digest_listing(source: ImageSource) -> str:
    """Of names, order and labels of a split's images; not of their contents, nor of where they lie."""
    return digest("\0".join(map(source.name, range(len(source)))), source.targets.tobytes())


def _list(values: Mapping[int, float], spec: str) -> str:
    """s3 2.46 s4 1.45: the values after stages 3 and 4."""
    return " ".join(f"s{stage} {value:{spec}}" for stage, value in values.items())

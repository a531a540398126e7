"""What a model's answers owe to its contexts: they are exchanged, averaged or taken away, and nothing is trained.

The contexts of a stage are those that its merging gives (section 3.2). A batch is of images in random order, so that an
image's neighbour is a stranger.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from contextual_cnn.contracts import Batch
from contextual_cnn.distributed import World
from contextual_cnn.engine.sums import Sums
from contextual_cnn.errors import UserError
from contextual_cnn.models import ContextualModel
from contextual_cnn.settings.evaluation import ContextControl
from contextual_cnn.task import Call
from contextual_cnn.tasks.image_classification.measure import Accuracy, ClassificationEvaluation

# (B F, E) contexts of a batch, F of each sample (frames of a video; 1 of an image) -> those that take their places
_CONTROLS: Mapping[ContextControl, Callable[[Tensor, int], Tensor]] = {
    "swap": lambda contexts, frames: contexts.roll(frames, dims=0),
    "mean": lambda contexts, _: contexts.mean(dim=0, keepdim=True).expand_as(contexts),
    "zero": lambda contexts, _: torch.zeros_like(contexts),
}


class ControlledEvaluation(ClassificationEvaluation):
    """Of each model beside the same model with other contexts. The other arguments are `ClassificationEvaluation`'s.

    Args:
        control: what takes the contexts' places, "swap", "mean" or "zero".
        stages: in which; None is all contextual stages.
    """

    def __init__(self, *arguments: object, control: ContextControl, stages: Sequence[int] | None) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type] # they are its own
        self._control, self._stages = control, stages

    def measure(self, model: nn.Module) -> "ControlledAccuracy":  # type: ignore[override] # it reports more
        """Raises UserError for a model that has no context, or none in these stages."""
        there = model.contextual_stages if isinstance(model, ContextualModel) else ()
        stages = self._stages or there
        if not isinstance(model, ContextualModel) or not set(stages) <= set(there):
            has = ", ".join(map(str, there)) or "none"
            raise UserError(
                f"context={self._control}: the model's contextual stages are {has}", "context=own context_stages=null"
            )
        return ControlledAccuracy(model, self._world, self._among, self._observe, _CONTROLS[self._control], stages)


class ControlledAccuracy:
    """Own accuracy, and under "controlled_..." what other contexts make of it.

    controlled_logits: root mean square of the change of an image's logits, in percent of that of the logits, both
        around the image's mean. controlled_answers: percentage of the images whose best class is another one.
    """

    def __init__(
        self,
        model: ContextualModel,
        world: World,
        among: Tensor | None,
        observe: Callable[[Tensor, Tensor], None] | None,
        control: Callable[[Tensor, int], Tensor],
        stages: Sequence[int],
    ) -> None:
        self._model, self._control, self._stages = model, control, stages
        self._observe = observe
        self._own = Accuracy(model, world, among, self._remember)
        self._other = Accuracy(model, world, among, self._compare)
        self._sums = Sums(world.device, ["images", "answers", "change", "spread"])
        self._logits: Tensor | None = None

    def add(self, call: Call, batch: Batch) -> None:
        """Shows the model a batch, twice."""
        self._own.add(call, batch)
        with self._other_contexts(batch.size):
            self._other.add(call, batch)

    def report(self) -> dict[str, float]:
        """The figures over all ranks."""
        own, other, sums = self._own.report(), self._other.report(), self._sums.read()
        return own | {
            "controlled_top1": other["top1"],
            "controlled_logits": 100 * (sums["change"] / max(sums["spread"], 1e-30)) ** 0.5,
            "controlled_answers": 100 * sums["answers"] / max(sums["images"], 1),
        }

    def _remember(self, targets: Tensor, logits: Tensor) -> None:
        self._logits = logits
        if self._observe is not None:
            self._observe(targets, logits)

    def _compare(self, _: Tensor, logits: Tensor) -> None:
        assert self._logits is not None  # of the same batch
        both = torch.isfinite(self._logits) & torch.isfinite(logits)  # what neither has dropped
        own, other = (_around_mean(values, both) for values in (self._logits, logits))
        self._sums.add(
            images=len(logits),
            answers=(self._logits.argmax(1) != logits.argmax(1)).sum(),
            change=(own - other).square().sum(),
            spread=own.square().sum(),
        )

    @contextmanager
    def _other_contexts(self, samples: int) -> Iterator[None]:
        def control(_: nn.Module, __: Any, contexts: Tensor) -> Tensor:
            return self._control(contexts, len(contexts) // samples)

        hooks = [self._model.mergings[str(stage)].register_forward_hook(control) for stage in self._stages]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _around_mean(logits: Tensor, counted: Tensor) -> Tensor:
    """(B, N) float64, each image's around their mean; 0 where not counted."""
    values = logits.double().where(counted, 0.0)
    mean = values.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    return (values - mean).where(counted, 0.0)

"""The seam between the training loop and what is learned from what.

The loop (engine/) knows steps, gradients, averages, checkpoints and processes. A `Task` knows batches, losses and
measures. The tasks are listed in tasks/__init__.py.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.distributed import World
from contextual_cnn.randomness import Places
from contextual_cnn.settings.trainer import TrainerSettings

# A model as the loop calls it: under the run's precision, wrapped for several processes
Call = Callable[..., Any]


class Batch(Protocol):
    """A micro-batch on the device.

    size: samples, the denominator of every mean.
    replaced: samples that stand in for others, which cannot be used.
    """

    @property
    def size(self) -> int: ...

    @property
    def replaced(self) -> int: ...


@dataclass(frozen=True)
class Outcome:
    """What a micro-batch's forward pass gives the step.

    loss: scalar to differentiate, a mean over the samples.
    parts: detached scalars by name, in the order in which they are logged; means like the loss.
    hits: detached scalars by name, counts of samples; logged as percentages.
    """

    loss: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    hits: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Position:
    """Where a process of a run stands: which samples are its own from here on, and every random number of them."""

    plan: BatchPlan
    seed: int
    world: World
    step: int = 0

    def at(self, step: int) -> "Position":
        """The same process at another step, counted from 0."""
        return replace(self, step=step)


class Metric(NamedTuple):
    """The figure by which one evaluation is better than another: the larger, the better.

    name: its key in a report. label: as a person reads it. least: below any value.
    """

    name: str
    label: str
    least: float = -1.0


class Measure(Protocol):
    """What an evaluation finds out about one model."""

    def add(self, call: Call, batch: Any) -> None:
        """Shows the model one batch. Nothing here waits for the device."""

    def report(self) -> dict[str, float]:
        """The figures over all ranks, with the number of samples as "images"; called by all ranks at once."""
        ...


class Evaluation(Protocol):
    """One pass over the validation split, as often as it is asked for.

    samples: of the whole split. batches: this rank's share of one pass, each time it is iterated.
    """

    samples: int
    batches: Iterable[Any]

    def measure(self, model: nn.Module) -> Measure: ...


class Task(Protocol):
    """What the loop does not know. A task is a subclass; what it does not need it leaves as it is here.

    Attributes:
        best: by what best.pt is chosen.
        settings: the record of the task's own groups of keys.
    """

    best: Metric
    settings: Any

    @abstractmethod
    def build_model(self) -> nn.Module:
        """On the CPU. The global generators have been seeded."""
        ...

    def check_model(self, model: nn.Module, settings: TrainerSettings, plan: BatchPlan) -> None:
        """Raises UserError for a model that these batches cannot train; warns of what looks like a mistake."""

    @abstractmethod
    def batches(self, position: Position) -> Iterator[Any]:
        """This rank's endless micro-batches from a position on."""
        ...

    def norm_images(self, settings: TrainerSettings, plan: BatchPlan) -> int:
        """How many images a statistic of a batch norm should be of."""
        return settings.norm_batch if settings.sync_bn else plan.micro_batch

    def prepare(self, batch: Any, places: Places | None) -> Any:
        """What is done to a micro-batch on its device.

        Args:
            places: of its samples, by which all is drawn. None: by the global generators, which have been seeded for
                this micro-batch, as runs of DRAWS 1 did.
        """
        return batch

    @abstractmethod
    def forward(self, call: Call, batch: Any) -> Outcome:
        """The model's answer to a prepared micro-batch, and its loss."""
        ...

    @abstractmethod
    def evaluation(self, world: World) -> Evaluation:
        """Of the validation split."""
        ...

    def evidence(self, batch: Any) -> dict[str, Any]:
        """What is kept in a file of a micro-batch whose loss is not finite: tensors on the CPU, plain values."""
        return {}

    def facts(self) -> dict[str, str]:
        """What must be the same on all ranks, by name: see `agreement`."""
        return {}

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What a checkpoint holds of the data: "classes" (names), "images" (a number) and "listing" (a digest)."""
        ...

    def splits(self) -> dict[str, int]:
        """The number of samples of each split."""
        return {"train": self.record()["images"]}

    def log_summary(self) -> None:
        """Logs what the data are, before the model is built."""

    def describe(self, model: nn.Module) -> str:
        """Name, size and kind of the model in one line."""
        return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"

    def describe_step(self, metrics: Mapping[str, float]) -> str:
        """The losses and hits of a log step, in one line."""
        return f"loss {metrics['loss']:.3f}"

    def describe_evaluation(self, reports: Mapping[str, Mapping[str, float]]) -> str:
        """Reports by the name of the weights, in one line."""
        return ", ".join(f"{name} {self.best.label} {report[self.best.name]:.2f}" for name, report in reports.items())

    def remarks(self, model: nn.Module, report: Mapping[str, float]) -> Iterable[str]:
        """Warnings that an evaluation gives cause for."""
        return ()

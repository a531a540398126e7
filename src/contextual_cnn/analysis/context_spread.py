"""How much contexts, and the offsets that are made of them, vary from image to image.

A context that is the same for all images tells nothing, and so does a weight offset: a static kernel could hold it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from contextual_cnn.analysis.modulation import Modulation, record_modulations
from contextual_cnn.analysis.style import STAGE_COLORS, figure
from contextual_cnn.models import ContextualModel


class ContextSpread(NamedTuple):
    """Of one contextual stage, over all images.

    context: standard deviation of the contexts (root of the summed variances), over the norm of their mean.
    between_classes: share of that variance that lies between the classes' means; the rest is within classes.
    weight_offset: standard deviation of dw over the root mean square of the static kernels w; None where no layer of
        the stage has weight offsets.
    sampling_offset: standard deviation of dp, in pixels of the layers' input maps; None likewise.

    The deviations of dw and dp are root mean squares over all layers of the stage, channels, taps and positions.
    """

    context: float
    between_classes: float
    weight_offset: float | None
    sampling_offset: float | None


class _Moments:
    """Of values that come in batches. They are summed as differences from the first image's: a spread that is small
    beside the mean keeps its digits."""

    def __init__(self) -> None:
        self.images, self.squares = 0, 0.0

    def add(self, values: Tensor) -> Tensor:
        """(B, ...) -> (B, V) float64 differences from the first image's values."""
        values = values.double().flatten(1)
        if not self.images:
            self.first, self.sum = values[0], torch.zeros_like(values[0])
        differences = values - self.first
        self.images += len(values)
        self.sum += differences.sum(dim=0)
        self.squares += differences.square().sum().item()
        return differences

    @property
    def mean(self) -> Tensor:
        """(V,)."""
        return self.first + self.sum / self.images

    @property
    def variance(self) -> float:
        """Over the images, summed over the values."""
        return max(0.0, self.squares / self.images - (self.sum / self.images).square().sum().item())


class _ClassMoments(_Moments):
    """Those of (B, V) values of images of N classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._num_classes = num_classes

    def add_labelled(self, values: Tensor, labels: Tensor) -> None:
        """Takes (B, V) values and (B,) labels."""
        differences = self.add(values)
        if self.images == len(values):  # the first
            self._sums = differences.new_zeros(self._num_classes, differences.shape[1])
            self._counts = differences.new_zeros(self._num_classes)
        self._sums.index_add_(0, labels, differences)
        self._counts += labels.bincount(minlength=self._num_classes)

    @property
    def between(self) -> float:
        """The part of the variance that lies between the means of the classes."""
        means = self._sums / self._counts.clamp(min=1).unsqueeze(1)
        around = (means - self.sum / self.images).square().sum(dim=1)
        return ((self._counts * around).sum() / self.images).item()


class _Stage:
    """What is known of a stage so far."""

    def __init__(self, num_classes: int) -> None:
        self.contexts = _ClassMoments(num_classes)
        self.offsets: dict[tuple[str, str], _Moments] = {}  # by layer and part
        self.kernels: dict[str, Tensor] = {}

    def add_offsets(self, modulation: Modulation) -> None:
        for part in ("weight_offset", "sampling_offset"):
            offset = getattr(modulation, part)
            if offset is not None:
                self.offsets.setdefault((modulation.name, part), _Moments()).add(offset)
        self.kernels[modulation.name] = modulation.static_kernel()

    def spread(self) -> ContextSpread:
        variance = self.contexts.variance
        kernels = sum(
            self.kernels[name].square().sum().item() for name, part in self.offsets if part == "weight_offset"
        )
        weights, positions = self._varied("weight_offset"), self._varied("sampling_offset")
        return ContextSpread(
            context=variance**0.5 / max(self.contexts.mean.norm().item(), 1e-30),
            between_classes=self.contexts.between / variance if variance else 0.0,
            weight_offset=(weights[0] / kernels) ** 0.5 if weights else None,
            sampling_offset=(positions[0] / positions[1]) ** 0.5 if positions else None,
        )

    def _varied(self, part: str) -> tuple[float, int] | None:
        """Variance summed over the layers' offsets, and how many they are."""
        found = [moments for (_, of), moments in self.offsets.items() if of == part]
        return (sum(m.variance for m in found), sum(len(m.sum) for m in found)) if found else None


@torch.no_grad()
def context_spread(model: ContextualModel, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[int, ContextSpread]:
    """By contextual stage, over all images.

    Args:
        model: in evaluation mode. A model of context_of="told" is told the labels.
        batches: (B, 3, S, S) images and (B,) labels.
    """
    contexts: dict[int, Tensor] = {}
    stages = {stage: _Stage(model.class_embeddings.out_features) for stage in model.contextual_stages}
    hooks = [
        model.mergings[str(stage)].register_forward_hook(lambda *call, stage=stage: contexts.update({stage: call[2]}))
        for stage in stages
    ]
    try:
        for images, labels in batches:
            modulations = record_modulations(model, images, told=labels)
            for stage, found in stages.items():
                found.contexts.add_labelled(contexts[stage], labels)
                for modulation in modulations:
                    if modulation.name.startswith(f"{model.feature_info[stage - 5]['module']}."):
                        found.add_offsets(modulation)
    finally:
        for hook in hooks:
            hook.remove()
    return {stage: found.spread() for stage, found in stages.items()}


def spread_table(spreads: Mapping[int, ContextSpread], title: str) -> Table:
    """A row for each stage."""
    table = Table("stage", *_HEADINGS.values(), title=title)
    for stage, spread in spreads.items():
        table.add_row(str(stage), *(_text(key, value) for key, value in spread._asdict().items()))
    return table


def plot_context_spread(spreads: Mapping[int, ContextSpread], title: str, path: Path) -> None:
    """A panel for each number, a bar for each stage."""
    with figure(path, 1, len(_HEADINGS), (2.4, 2.8), title) as axes:
        for axis, (key, heading) in zip(axes[0], _HEADINGS.items(), strict=True):
            values = [getattr(spread, key) for spread in spreads.values()]
            bars = axis.bar(
                [str(stage) for stage in spreads],
                [value or 0.0 for value in values],
                color=[STAGE_COLORS[stage] for stage in spreads],
            )
            axis.bar_label(bars, [_text(key, value) for value in values], fontsize=8)
            axis.set_xlabel("stage")
            axis.set_title(heading, fontsize=9, wrap=True)


_HEADINGS = {
    "context": "context, std / norm of mean",
    "between_classes": "of that variance between classes",
    "weight_offset": "dw, std / rms of w",
    "sampling_offset": "dp, std in map pixels",
}


def _text(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if key == "sampling_offset" else f"{value:.1%}"

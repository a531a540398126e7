"""Counts and sums that stay on the device until somebody reads them, then cross the ranks in one all-reduce."""

from collections.abc import Iterable

import torch
from torch import Tensor

from contextual_cnn.contracts import StagedScores, stage_name
from contextual_cnn.distributed import all_reduce_sum


class Sums:
    """Named running sums. `read` waits for the device; `add` does not.

    Args:
        names: sums that exist even if nothing is added. All ranks must have the same names when they read,
            so a rank that may have nothing to add needs them.
    """

    def __init__(self, device: torch.device, names: Iterable[str] = ()) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self.add(**dict.fromkeys(names, 0.0))

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), dtype=torch.float64, device=self._device)
            self._sums[name] = self._sums[name] + value

    def read(self) -> dict[str, float]:
        """The sums over all ranks since the last read; starts again from zero."""
        names, self._sums, sums = sorted(self._sums), {}, self._sums
        if not names:
            return {}
        totals = all_reduce_sum(torch.stack([sums[name] for name in names]))
        return dict(zip(names, totals.tolist(), strict=True))


def stage_hits(scores: StagedScores, labels: Tensor) -> dict[str, Tensor]:
    """How many images' true class is on the shortlist that each stage hands on: recall_stageS as counts.

    Args:
        labels: (B,) int64.
    """
    return {
        stage_name("recall", stage): (shortlist == labels.unsqueeze(1)).any(dim=1).sum()
        for stage, shortlist in zip(scores.stages[:-1], scores.shortlists, strict=True)
    }


def top_hits(logits: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[str, Tensor]:
    """How many images' true class is among the k best: top1, top5 as counts. k is cut to the number of classes."""
    best = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices
    hits = best == labels.unsqueeze(1)
    return {f"top{k}": hits[:, :k].any(dim=1).sum() for k in ks}


def labels_of(targets: Tensor) -> Tensor:
    """(B,) class indices of hard targets as they are, of soft targets the class with the largest share."""
    return targets if targets.ndim == 1 else targets.argmax(dim=1)

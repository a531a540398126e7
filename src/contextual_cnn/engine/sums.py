"""Counts and sums that stay on the device until somebody reads them, then cross the ranks in one all-reduce."""

from collections.abc import Iterable

import torch
from torch import Tensor

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

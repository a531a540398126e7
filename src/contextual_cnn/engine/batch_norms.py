"""Batch norms that do not depend on how many processes there are.

A statistic is of as many images as `NormPlan` says, the recipe's, whether they are a part of one micro-batch or spread
over the micro-batches of several ranks; in the second case gradients cross the ranks as well. The running statistics
move once for each optimizer step, towards the mean of all its statistics, and are the same on every rank.
"""

from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from contextual_cnn.batch_plan import BatchPlan, NormPlan
from contextual_cnn.distributed import all_reduce_sum


class BatchNorms:
    """The batch norms of a model, which from now on normalise in groups and leave their statistics here.

    Args:
        model: on its device; its batch norms are changed in place. What else has running statistics is left alone.
        groups: how the images are shared out over the statistics; called for by all ranks at once.
        patience: how long a rank waits for the others of its statistics; None is torch's half an hour.

    Attributes:
        images: of a statistic.
        managed: their buffers.
    """

    def __init__(self, model: nn.Module, plan: BatchPlan, groups: NormPlan, patience: timedelta | None = None) -> None:
        self.images = groups.images
        self._norms = [_grouped(module, groups) for module in model.modules() if _is_batch_norm(module)]
        if self._norms and groups.ranks > 1:
            ranks, _ = dist.new_subgroups(groups.ranks, timeout=patience)
            for norm in self._norms:
                norm.process_group = ranks
        self._statistics = plan.global_batch // groups.images  # of a step
        if self._norms:
            # How far the running statistics move: as if a step's statistics moved them one after the other
            shares = [1 - (1 - norm.momentum) ** self._statistics for norm in self._norms]
            parts = [torch.full_like(norm.running_mean, s) for norm, s in zip(self._norms, shares, strict=True)]
            self._shares = torch.cat(parts)
        self.managed = [buffer for norm in self._norms for buffer in norm.buffers()]

    def __len__(self) -> int:
        return len(self._norms)

    @torch.no_grad()
    def settle(self, finite: Tensor) -> None:
        """The end of an optimizer step: moves the running statistics, or leaves them if it was not taken.

        Args:
            finite: bool scalar on the device, the same on all ranks.
        """
        if not self._norms:
            return
        norms = self._norms
        sums = all_reduce_sum(torch.cat([norm.sums for norm in norms], dim=1))
        running = torch.stack([torch.cat([n.running_mean for n in norms]), torch.cat([n.running_var for n in norms])])
        moved = running.lerp(sums[:2] / sums[2].clamp(min=1), self._shares)
        moved = torch.where((sums[2] > 0) & finite, moved, running)  # 0: it was frozen
        sizes = [norm.num_features for norm in norms]
        for buffers, values in zip(("running_mean", "running_var"), moved, strict=True):
            torch._foreach_copy_([getattr(norm, buffers) for norm in norms], values.split(sizes))
        counters = [cast(Tensor, norm.num_batches_tracked) for norm in norms]
        torch._foreach_add_(counters, finite * self._statistics)
        torch._foreach_zero_([norm.sums for norm in norms])
        torch._foreach_zero_([norm.latest[:2] for norm in norms])  # a NaN would stay in it


class _GroupedNorm(_BatchNorm):
    """A batch norm in groups; in evaluation as ever.

    Attributes:
        latest: (3, C), mean and unbiased variance of the statistic that was made last, and ones.
        sums: (3, C), of them since the last step. No buffers, which would travel with the model.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float
    groups: NormPlan
    process_group: dist.ProcessGroup | None
    latest: Tensor
    sums: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if not self.training or x.numel() == x.shape[1]:  # one vector alone has no variance
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.process_group is not None:
            return self._across_ranks(x)
        parts = [self._alone(part) for part in x.chunk(self.groups.parts)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _alone(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.latest[0], self.latest[1], self.weight, self.bias, True, 1.0, self.eps)
        self.sums.add_(self.latest)
        return y

    def _across_ranks(self, x: Tensor) -> Tensor:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(values, [0, *range(2, x.ndim)], correction=0)
        every = _gathered(torch.stack([mean, variance]), self.process_group)  # (ranks, 2, C)
        means, variances = every.unbind(1)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        with torch.no_grad():
            count = self.groups.ranks * x.numel() / x.shape[1]
            self.latest[0], self.latest[1] = mean, variance * (count / (count - 1))
            self.sums.add_(self.latest)
        scale = (variance + self.eps).rsqrt() * self.weight if self.affine else (variance + self.eps).rsqrt()
        shape = (1, -1, *[1] * (x.ndim - 2))
        y = (values - mean.view(shape)) * scale.view(shape)
        return (y + self.bias.view(shape) if self.affine else y).to(x.dtype)


class _GroupedNormAct(_GroupedNorm):
    """timm's batch norm with what follows it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return cast(Tensor, self.act(self.drop(super().forward(x))))


class _GatherOverRanks(torch.autograd.Function):
    """(…) of each rank -> (ranks, …) on each; the gradient of a rank's own part is the sum of what all make of it."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine, group)
        return torch.stack(every)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


@torch.compiler.disable
def _gathered(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return cast(Tensor, _GatherOverRanks.apply(mine.contiguous(), group))


def _is_batch_norm(module: nn.Module) -> bool:
    """One that keeps running statistics up to date, of torch or of timm."""
    is_known = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    return (
        is_known
        and not getattr(module, "is_frozen", False)
        and module.running_mean is not None
        and module.momentum is not None
    )


def _grouped(norm: nn.Module, groups: NormPlan) -> _GroupedNorm:
    """The same module, with another forward: hooks, names and whoever holds it need not know."""
    norm.__class__ = _GroupedNormAct if isinstance(norm, BatchNormAct2d) else _GroupedNorm
    grouped = cast(_GroupedNorm, norm)
    grouped.groups, grouped.process_group = groups, None
    grouped.latest = torch.ones_like(grouped.running_mean).repeat(3, 1)
    grouped.latest[:2] = 0
    grouped.sums = torch.zeros_like(grouped.latest)
    return grouped

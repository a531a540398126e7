"""The optimizer with timm's no-decay rules, and its step behind the guard against non-finite gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from contextual_cnn.errors import UserError
from contextual_cnn.settings.optimizer import OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings, global_batch: int) -> torch.optim.Optimizer:
    """timm's optimizer by name over the model's parameters.

    No weight decay for biases (offset biases too), norms, layer scales, and what `model.no_weight_decay()` names
    (class embeddings, temperature).

    Args:
        global_batch: images per step.

    Raises:
        UserError: unknown name, or an option that it does not have.
    """
    name = settings.name
    options: dict[str, Any] = dict(settings.own_options)
    if name not in list_optimizers():
        raise UserError(
            f"there is no optimizer named {name!r}",
            "optimizer.name is one of timm's, for example adamw, lamb, sgd",
        )
    _check_options(name, options)
    if name in ("adamw", "adam"):
        options["fused"] = True
    try:
        return create_optimizer_v2(
            model, opt=name, lr=settings.lr_at(global_batch), weight_decay=settings.weight_decay, **options
        )
    except (ValueError, TypeError, AssertionError, ImportError) as error:  # what it looks at itself
        raise UserError(f"optimizer {name} cannot be built: {error}", "optimizer=adamw is the recipe's") from error


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Whether the optimizer has them."""
    info = get_optimizer_info(name)
    lacking = [key for key in options if not getattr(info, f"has_{key}")]
    if lacking:  # timm would pass over them in silence
        raise UserError(
            f"optimizer {name} has no {' and no '.join(lacking)}", " ".join(f"optimizer.{key}=null" for key in lacking)
        )
    betas = options.get("betas")
    if betas is not None and not (len(betas) == info.num_betas and all(0 <= beta < 1 for beta in betas)):
        raise UserError(
            f"optimizer.betas of {name} are {info.num_betas} numbers from 0 to below 1, got {list(betas)}",
            "optimizer.betas=null takes its own",
        )


def may_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> bool:
    """Whether the host is to call `optimizer.step()`, which then changes nothing (weights, moments and their count)
    if `finite` is False.

    Args:
        finite: bool scalar on the parameters' device, the same on all ranks.
    """
    if optimizer.defaults.get("fused"):
        # The fused kernels look at found_inf themselves, as under a GradScaler: the host need not wait
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined] # as it does
        return True
    return bool(finite)

"""The optimizer with timm's no-decay rules, and its step behind the guard against non-finite gradients."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from contextual_cnn.errors import UserError


def build_optimizer(
    model: nn.Module,
    global_batch: int = 4096,
    *,
    name: str = "adamw",
    lr: float = 1e-3,
    lr_scaling: Literal["none", "linear", "sqrt"] = "none",
    lr_base_size: int = 4096,
    weight_decay: float = 0.05,
    betas: Sequence[float] | None = (0.9, 0.999),
    eps: float | None = 1e-8,
    momentum: float | None = None,
) -> torch.optim.Optimizer:
    """timm's optimizer by name over the model's parameters.

    No weight decay for biases (offset biases too), norms, layer scales, and what `model.no_weight_decay()` names
    (class embeddings, temperature).

    Args:
        global_batch: images per step.
        lr: peak learning rate, as it is, unless lr_scaling says otherwise.
        lr_scaling, lr_base_size: lr belongs to a batch of lr_base_size images, and grows in proportion to the global
            batch, or to its square root.
        betas, eps, momentum: None leaves the optimizer's own; set those to null that an optimizer does not have.

    Raises:
        UserError: unknown name, an option that it does not have, or a number out of range.
    """
    if not 0 < lr < math.inf:
        raise UserError(f"optimizer.lr must be above 0 and finite, got {lr}", "optimizer.lr=1e-3")
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"optimizer.weight_decay must be 0 or more, got {weight_decay}", "optimizer.weight_decay=0.05")
    if name not in list_optimizers():
        raise UserError(
            f"there is no optimizer named {name!r}",
            "optimizer.name is one of timm's, for example adamw, lamb, sgd",
        )
    given = {"betas": tuple(betas) if betas is not None else None, "eps": eps, "momentum": momentum}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    _check_options(name, options)
    if lr_base_size < 1:
        raise UserError(f"optimizer.lr_base_size must be 1 or more, got {lr_base_size}", "optimizer.lr_base_size=4096")
    lr *= (global_batch / lr_base_size) ** {"none": 0, "linear": 1, "sqrt": 0.5}[lr_scaling]
    if name in ("adamw", "adam"):
        options["fused"] = True
    try:
        return create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay, **options)
    except (ValueError, TypeError, AssertionError, ImportError) as error:  # what it looks at itself
        raise UserError(f"optimizer {name} cannot be built: {error}", "optimizer=adamw is the recipe's") from error


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Whether the optimizer has them, and every number is in range."""
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
    if not 0 <= options.get("eps", 0) < math.inf:
        raise UserError(f"optimizer.eps must be 0 or more, got {options['eps']}", "optimizer.eps=1e-8")
    if not 0 <= options.get("momentum", 0) < 1:
        raise UserError(
            f"optimizer.momentum must be from 0 to below 1, got {options['momentum']}", "optimizer.momentum=0.9"
        )


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """One optimizer step, or none at all (weights, moments and their count untouched) if `finite` is False.

    Args:
        finite: bool scalar on the parameters' device, the same on all ranks.
    """
    if optimizer.defaults.get("fused"):
        # The fused kernels look at found_inf themselves, as under a GradScaler: the host need not wait
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined] # as it does
        optimizer.step()
    elif finite.item():
        optimizer.step()

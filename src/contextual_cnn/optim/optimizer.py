"""The optimizer with timm's no-decay rules, and its step behind the guard against non-finite gradients."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_weight_decay
from torch import Tensor, nn

from contextual_cnn.contracts import TimmModel
from contextual_cnn.errors import UserError
from contextual_cnn.optim.layer_decay import layer_factors
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
            _scaled_groups(model, settings) or model,
            opt=name,
            lr=settings.lr_at(global_batch),
            weight_decay=settings.weight_decay,
            **options,
        )
    except (ValueError, TypeError, AssertionError, ImportError) as error:  # what it looks at itself
        raise UserError(f"optimizer {name} cannot be built: {error}", "optimizer=adamw is the recipe's") from error


def _scaled_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]] | None:
    """timm's groups, with and without weight decay, cut by the factors of the learning rate; None if there are none.

    timm's schedules multiply a group's learning rate by its lr_scale.
    """
    factors = _lr_factors(model, settings)
    if not factors:
        return None
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    cut = []
    for group in param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=spared):
        scales = [factors.get(parameter, 1.0) for parameter in group["params"]]
        for scale in dict.fromkeys(scales):
            chosen = [p for p, other in zip(group["params"], scales, strict=True) if other == scale]
            cut.append(group | {"params": chosen, "lr_scale": scale})
    return cut


def _lr_factors(model: nn.Module, settings: OptimizerSettings) -> dict[Tensor, float]:
    """By what the learning rate of a parameter is multiplied, where that is not 1."""
    factors = layer_factors(model, settings.layer_decay) if settings.layer_decay is not None else {}
    for parts, factor in (
        (_biases, settings.bias_lr),
        (_classifier_parameters, settings.classifier_lr),
        (_generator_parameters, settings.generator_lr),
    ):
        if factor is not None:
            for parameter in parts(model):
                factors[parameter] = factors.get(parameter, 1.0) * factor
    return factors


def _biases(model: nn.Module) -> Iterator[Tensor]:
    """Of convolutions and linear layers, not of norms."""
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.ndim > 1:
            yield bias


def _classifier_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Of the classifier, and of what a contextual model has in its place after the last stage."""
    yield from cast(TimmModel, model).get_classifier().parameters()
    if hasattr(model, "last_projection"):
        yield from cast(nn.Module, model.last_projection).parameters()


def _generator_parameters(model: nn.Module) -> Iterator[Tensor]:
    generators = [module for module in model.modules() if getattr(module, "is_generator", False)]
    if not generators:
        raise UserError(
            "optimizer.generator_lr: this model has no generators of offsets", "optimizer.generator_lr=null"
        )
    for generator in generators:
        yield from generator.parameters()


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

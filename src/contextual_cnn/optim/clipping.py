"""Clipping of the gradient, in timm's three ways."""

from typing import cast

from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from contextual_cnn.contracts import TimmModel
from contextual_cnn.settings.trainer import Clipping


def clip_gradients(model: nn.Module, limit: float | None, mode: Clipping) -> Tensor:
    """Clips in place.

    Args:
        limit: the largest norm of the whole gradient, the largest value of an entry, or AGC's factor of a unit's
            weights, which leaves the classifier alone (as its paper and timm do); None clips nothing.

    Returns:
        Scalar, the norm before it.
    """
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is None:
        return norm
    if mode == "norm":
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    else:
        spared = {id(p) for p in cast(TimmModel, model).get_classifier().parameters()} if mode == "agc" else set()
        dispatch_clip_grad([p for p in parameters if id(p) not in spared], limit, mode)
    return norm

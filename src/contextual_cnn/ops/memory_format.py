"""Between torch's (B, C, H, W) and the kernels' channels innermost; channels_last tensors are not copied."""

import torch
from torch import Tensor


def output_shape(offset: Tensor | None, mask: Tensor | None) -> torch.Size:
    """Ho and Wo: those of the offset, of the mask, or of both; one of the two is always there."""
    like = offset if offset is not None else mask
    assert like is not None
    return like.shape[2:]


def pixels(image: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) -> contiguous (B, H, W, C)."""
    return image.to(dtype).permute(0, 2, 3, 1).contiguous()


def taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, kh, kw) -> contiguous (B, K, C). A weight is small: its copy costs nothing beside the map."""
    return weight.to(dtype).flatten(2).transpose(1, 2).contiguous()


def taps_back(gradient: Tensor, like: Tensor) -> Tensor:
    """(B, K, C) -> the shape and type of a (B, C, kh, kw) weight, contiguous as its maker wants it."""
    return gradient.transpose(1, 2).to(like.dtype).contiguous().view(like.shape)


def map_back(gradient: Tensor, like: Tensor) -> Tensor:
    """(B, P, ...) or (B, H, W, C) -> the shape and type of a (B, maps, H, W) map, channels_last."""
    return gradient.reshape(len(like), *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2).to(like.dtype)

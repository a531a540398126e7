"""The temporal shift module, TSM (Lin et al., ICCV 2019): a ResNet for images that sees the frames around each frame.

A share of the channels comes from the next frame, another from the frame before, all others stay. It is done in front
of a block's first convolution, within the residual branch, so that no frame loses its own features ("blockres").

Shapes: B clips, T frames, C channels, H W map; the model sees (B T, C, H, W), the frames of a clip one after the other.
"""

import torch
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from contextual_cnn.errors import UserError
from contextual_cnn.models.contextual_model import ContextualModel
from contextual_cnn.models.resnet import ContextualBottleneck
from contextual_cnn.settings.clip import ClipSettings

_DEEP_STAGE = 23  # blocks of ResNet-101's third stage: from here on only every second block is shifted, as published


def fit_to_clips(model: nn.Module, clip: ClipSettings) -> None:
    """Makes a model of images one of clips, (B T, 3, H, W) with the frames of a clip one after the other.

    Raises:
        UserError: a model that cannot be shifted, or a selection that would drop classes in one frame of a clip only.
    """
    if isinstance(model, ContextualModel):
        if model.selection == "reduce" and model.context_of != "clip":
            raise UserError(
                "model.selection=reduce drops classes frame by frame, so that a clip has no mean score for them",
                "model.context_of=clip, or model.selection=rerank",
            )
        model.frames = clip.frames
    if clip.shift_div is not None:
        shift_in_time(model, clip.frames, clip.shift_div)
    if clip.partial_bn:
        freeze_batch_norms(model)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Normalises by its running statistics, in training too, and learns nothing."""

    is_frozen = True  # for the training loop, which has ways of its own with batch norms

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def freeze_batch_norms(model: nn.Module) -> None:
    """All of maps but the first one, in place: names, weights and statistics stay."""
    _, *others = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for norm in others:
        norm.__class__ = FrozenBatchNorm2d
        norm.requires_grad_(False)


def temporal_shift(x: Tensor, frames: int, shift_div: int) -> Tensor:
    """Moves channels between neighbouring frames of a clip; zeros come in at its ends.

    Args:
        x: (B T, C, H, W).
        shift_div: the first C // shift_div channels come from the next frame, the second as many from the one before.
    """
    clips = x.unflatten(0, (-1, frames))
    fold = x.shape[1] // shift_div
    later, earlier, rest = clips.split([fold, fold, x.shape[1] - 2 * fold], dim=2)
    edge = torch.zeros_like(later[:, :1])
    later, earlier = torch.cat([later[:, 1:], edge], dim=1), torch.cat([edge, earlier[:, :-1]], dim=1)
    shifted = torch.cat([later, earlier, rest], dim=2).flatten(0, 1)
    channels_last = torch.channels_last
    return shifted.contiguous(memory_format=channels_last) if x.is_contiguous(memory_format=channels_last) else shifted


class ShiftedConv2d(nn.Conv2d):
    """A convolution of frames after the shift. It takes over the weights of the one that it replaces, and their names.

    Args:
        conv: without groups, as the first of a bottleneck.
    """

    def __init__(self, conv: nn.Conv2d, frames: int, shift_div: int) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type] # torch's types forget how many dimensions it has
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.frames, self.shift_div = frames, shift_div

    def forward(self, x: Tensor) -> Tensor:
        """(B T, C, H, W) -> (B T, C', H', W')."""
        return super().forward(temporal_shift(x, self.frames, self.shift_div))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frames={self.frames}, shift_div={self.shift_div}"


def shift_in_time(model: nn.Module, frames: int, shift_div: int) -> None:
    """Puts the shift in front of the first convolution of every bottleneck; of every second one in a ResNet-101.

    Raises:
        UserError: the model has no bottlenecks.
    """
    stages = [getattr(model, f"layer{stage}", ()) for stage in range(1, 5)]
    step = 2 if len(stages[2]) >= _DEEP_STAGE else 1
    blocks = [block for stage in stages for block in list(stage)[::step]]
    if not blocks or not all(isinstance(block, Bottleneck | ContextualBottleneck) for block in blocks):
        raise UserError(
            f"clip.shift_div={shift_div}: the temporal shift is for ResNets with bottlenecks, not for "
            f"{type(model).__name__}",
            "model=contextual_resnet50, or clip.shift_div=null for a mean over the frames",
        )
    for block in blocks:
        block.conv1 = ShiftedConv2d(block.conv1, frames, shift_div)

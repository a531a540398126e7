"""Grad-CAM (Selvaraju et al., 2017): where the last convolution finds what speaks for a class (figure 4)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contextual_cnn.analysis.images import Images
from contextual_cnn.analysis.style import figure, short, show_image
from contextual_cnn.errors import UserError
from contextual_cnn.models.contextual_conv import ContextualConv2d, DeformableConv2d, ExtraInputConv2d

_CONVOLUTIONS = (nn.Conv2d, ContextualConv2d, ExtraInputConv2d, DeformableConv2d)
_MAP = "inferno"


class GradCam(NamedTuple):
    """What a model says of B images, and where it sees it.

    predicted: (B,) class indices. scores: (B,) their probabilities. maps: (B, H, W) of the convolution, 0 to 1 each.
    """

    predicted: Tensor
    scores: Tensor
    maps: Tensor


def grad_cam(model: nn.Module, layer: nn.Module, inputs: Tensor) -> GradCam:
    """ReLU(sum_c a_c A_c), where a_c is the mean over the map A_c of the gradient of the predicted class's logit.

    Args:
        layer: a module of the model whose output is a (B, C, H, W) map.
        inputs: (B, 3, S, S).
    """
    outputs = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with torch.enable_grad():
            logits = model(inputs)
            best, predicted = logits.max(dim=1)
            (features,) = outputs
            (gradient,) = torch.autograd.grad(best.sum(), features)
    finally:
        handle.remove()
    maps = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).relu().detach()
    peaks = maps.amax(dim=(1, 2), keepdim=True)
    probabilities = logits.detach().softmax(dim=1).gather(1, predicted.unsqueeze(1)).squeeze(1)
    return GradCam(predicted, probabilities, maps / peaks.clamp(min=torch.finfo(maps.dtype).tiny))


def last_convolution(model: nn.Module, stage: int) -> nn.Module:
    """The last convolution of a stage (1 to 4) that looks beyond a single position.

    Raises:
        UserError: the model has no such convolution.
    """
    stages = [info["module"] for info in getattr(model, "feature_info", [])][-4:]  # a ResNet lists its stem too
    found = list(_spatial_convolutions(model.get_submodule(stages[stage - 1]))) if len(stages) == 4 else []
    if not found:
        raise UserError(
            f"{type(model).__name__} has no convolution in a stage {stage}", "gradcam needs a convolutional network"
        )
    return found[-1]


def plot_grad_cam(images: Images, cams: Mapping[str, GradCam], classes: Sequence[str], stage: int, path: Path) -> None:
    """A row for each image: the image, then the map over it of each model, under what the model says.

    Args:
        cams: by the model's name.
    """
    size = images.pixels.shape[1:3]
    side = next(iter(cams.values())).maps.shape[1:]
    title = f"Grad-CAM of the predicted class, last convolution of stage {stage} ({side[0]}x{side[1]} positions)"
    with figure(path, len(images.names), 1 + len(cams), (2.6, 2.75), title) as axes:
        for b, row in enumerate(axes):
            label = images.labels[b]
            show_image(row[0], images.pixels[b], f"true: {short(classes[label])}" if label is not None else "image")
            for axis, (name, cam) in zip(row[1:], cams.items(), strict=True):
                heat = F.interpolate(cam.maps[b, None, None], size, mode="bilinear", align_corners=False)[0, 0]
                says = int(cam.predicted[b])
                verdict = "" if label is None else (": right" if says == label else ": wrong")
                show_image(axis, images.pixels[b], f"{name}\nsays {short(classes[says])}, {cam.scores[b]:.0%}{verdict}")
                axis.imshow(heat.cpu().numpy(), cmap=_MAP, vmin=0, vmax=1, alpha=0.55)


def _spatial_convolutions(module: nn.Module) -> Iterator[nn.Module]:
    """Not the small convolutions inside of a contextual one, which make its offsets."""
    if isinstance(module, _CONVOLUTIONS):
        if module.weight.shape[-1] > 1:
            yield module
        return
    for child in module.children():
        yield from _spatial_convolutions(child)

"""What the contextual convolutions of a model do for given images: their offsets, recorded by hooks."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from contextual_cnn.models.contextual_conv import ContextualConv2d


class Modulation(NamedTuple):
    """Of one contextual convolution, for B images; K taps.

    name: of the layer in the model.
    layer: with the static kernel and the geometry.
    input_size: (H, W) of its input map.
    weight_offset: (B, C, kh, kw), dw; None where the layer has none.
    sampling_offset: (B, 2K, Ho, Wo), dp in positions of the input map, y and x of each tap; None likewise.
    """

    name: str
    layer: ContextualConv2d
    input_size: tuple[int, int]
    weight_offset: Tensor | None
    sampling_offset: Tensor | None

    def static_kernel(self) -> Tensor:
        """(C, kh, kw), w; of a dense convolution, whose output channels share dw, their mean."""
        weight = self.layer.weight.detach()
        return weight[:, 0] if weight.shape[1] == 1 else weight.mean(dim=0)


@torch.no_grad()
def record_modulations(model: nn.Module, inputs: Tensor, told: Tensor | None = None) -> list[Modulation]:
    """One pass of (B, 3, S, S) images: what each contextual convolution came to, in the order of the layers.

    Args:
        told: (B,) true classes, for a `ContextualModel` of context_of="told".
    """
    sizes: dict[str, tuple[int, int]] = {}
    offsets: dict[str, Tensor] = {}
    handles = []
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ContextualConv2d)]

    def keep(where: dict, key: str, value: Tensor | tuple[int, int]) -> None:
        where[key] = value

    for name, layer in layers:
        handles.append(
            layer.register_forward_pre_hook(lambda _, inputs, name=name: keep(sizes, name, tuple(inputs[0].shape[2:])))
        )
        for part in ("weight_offset", "sampling_offset"):
            generator = getattr(layer, part)
            if generator is not None:
                key = f"{name}.{part}"
                handles.append(generator.register_forward_hook(lambda *call, key=key: keep(offsets, key, call[2])))
    try:
        model(inputs) if told is None else model(inputs, told=told)
    finally:
        for handle in handles:
            handle.remove()
    return [
        Modulation(name, layer, sizes[name], offsets.get(f"{name}.weight_offset"), _positions(offsets, name, layer))
        for name, layer in layers
    ]


def _positions(offsets: dict[str, Tensor], name: str, layer: ContextualConv2d) -> Tensor | None:
    """dp alone, where a layer's sampling_offset makes its mask too."""
    maps = offsets.get(f"{name}.sampling_offset")
    return maps[:, : 2 * layer.taps] if maps is not None else None

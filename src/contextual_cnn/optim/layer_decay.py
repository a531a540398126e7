"""Layer-wise decay of the learning rate, by ConvNeXt's own numbering of its layers.

The stem is layer 0, stages 1 and 2 with the downsampling before them are 1 and 2, every three blocks of stage 3 one
more, stage 4 another, and what follows the backbone the last: 7 and 13 of ConvNeXt-T and -S. timm's `group_matcher`
counts every block.
"""

import re

from torch import Tensor, nn

from contextual_cnn.errors import UserError

_PLACE = re.compile(r"(?:^|\.)(?:(stem)|stages\.(\d)\.(downsample|blocks\.(\d+)))\.")
_BLOCKS = 3  # of stage 3 that make a layer


def layer_numbers(model: nn.Module) -> dict[Tensor, int]:
    """By parameter, counted from 0; the largest number belongs to all that is not of a ConvNeXt's stages.

    Raises:
        UserError: the model has no stages of a ConvNeXt.
    """
    places = {parameter: _PLACE.search(name) for name, parameter in model.named_parameters()}
    depths = [int(place[4]) for place in places.values() if place and place[2] == "2" and place[4]]
    if not depths:
        raise UserError("optimizer.layer_decay: the layers of a ConvNeXt are numbered", "optimizer.layer_decay=null")
    last = 3 + -(-(max(depths) + 1) // _BLOCKS)
    return {parameter: _number(place, last) for parameter, place in places.items()}


def _number(place: re.Match | None, last: int) -> int:
    if place is None:
        return last + 1
    if place[1]:
        return 0
    stage, block = int(place[2]), int(place[4] or 0)
    return {0: 1, 1: 2, 2: 3 + block // _BLOCKS, 3: last}[stage]


def layer_factors(model: nn.Module, decay: float) -> dict[Tensor, float]:
    """By what the learning rate of a parameter is multiplied: decay for each layer between it and the last."""
    numbers = layer_numbers(model)
    last = max(numbers.values())
    return {parameter: decay ** (last - number) for parameter, number in numbers.items()}

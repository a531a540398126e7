"""Parameters and multiply-adds of a model, counted by running it."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from contextual_cnn.models.contextual_conv import ContextualConv2d, DeformableConv2d
from contextual_cnn.models.mask_rcnn import Detector

_PROPOSALS, _DETECTIONS = 1000, 100  # of an image, as mmdetection counts


class Cost(NamedTuple):
    """What a model costs.

    parameters: numbers.
    macs: multiply-adds of convolutions and matrix products for each image; a contextual convolution counts as the
        convolution that it replaces plus what generates its offsets.
    interpolation: the four further multiply-adds of each bilinear sample, for each image; papers do not count them.
    per_batch: multiply-adds that a batch of any size needs once (the merging layers' products with the class table).
    """

    parameters: int
    macs: int
    interpolation: int
    per_batch: int


def count_cost(model: nn.Module, image_size: int = 224) -> Cost:
    """Runs one and two images of zeros through the model in eval mode; the difference is the cost of an image."""
    macs_of_one, samples = _run(model.eval(), 1, image_size)
    macs_of_two, _ = _run(model, 2, image_size)
    macs = macs_of_two - macs_of_one
    return Cost(sum(p.numel() for p in model.parameters()), macs, 4 * samples, macs_of_one - macs)


def count_detector_cost(model: Detector, height: int = 800, width: int = 1280) -> Cost:
    """As papers count a detector: the body and the pyramid, and the heads for 1000 proposals and 100 detections.

    Nothing is computed: tensors have sizes and no values.
    """
    heads, channels = cast(Any, model.roi_heads), cast(int, model.backbone.out_channels)

    def detect() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            images = torch.zeros(1, 3, height, width)
            model.rpn.head(list(model.backbone(images).values()))
            heads.box_predictor(heads.box_head(images.new_zeros(_PROPOSALS, channels, 7, 7)))
            heads.mask_predictor(heads.mask_head(images.new_zeros(_DETECTIONS, channels, 14, 14)))

    macs, samples = _counted(model.eval(), detect)
    return Cost(sum(p.numel() for p in model.parameters()), macs, 4 * samples, 0)


def _run(model: nn.Module, batch_size: int, image_size: int) -> tuple[int, int]:
    return _counted(model, lambda: model(torch.zeros(batch_size, 3, image_size, image_size)))


def _counted(model: nn.Module, run: Callable[[], object]) -> tuple[int, int]:
    """Multiply-adds, and bilinear samples taken by convolutions with sampling offsets."""
    macs = samples = 0

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal macs, samples
        assert isinstance(module.weight, Tensor)
        taken = inputs[0].shape[1] * module.weight[0, 0].numel() * output[:, 0].numel()  # channels, taps, positions
        dense = module.weight.shape[1] > 1
        macs += taken * (len(module.weight) if dense else 1)
        macs += taken if dense and getattr(module, "weight_offset", None) is not None else 0
        samples += taken

    handles = [module.register_forward_hook(count) for module in model.modules() if _samples_bilinearly(module)]
    counter = FlopCounterMode(display=False)
    with counter:  # gradients stay on: the counter hooks into the graph of parameters that are passed as inputs
        run()
    for handle in handles:
        handle.remove()
    # The counter sees nothing of the sampled convolution itself, whichever its implementation
    return counter.get_total_flops() // 2 + macs, samples


def _samples_bilinearly(module: nn.Module) -> bool:
    return isinstance(module, DeformableConv2d) or (
        isinstance(module, ContextualConv2d) and (module.sampling_offset is not None or module.mask is not None)
    )

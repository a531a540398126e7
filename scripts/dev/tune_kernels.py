"""Times the Triton kernels with other blocks than the ones they have, at the sizes of the tiny model's layers.

python scripts/dev/tune_kernels.py [--batch-size 128] [--rounds 20] [--output FILE]

JSON: a line with each time, and at the end, for each kernel and layer, the blocks from fastest to slowest, in
milliseconds, by replays of a CUDA graph. All are compiled first, side by side. What is best overall belongs into the
blocks of ops/sampled_conv_triton.py and ops/depthwise_conv_triton.py. Needs a GPU, torch and triton.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from gpu_timing import by_kernel, replayed
from triton.runtime.errors import OutOfResources

from contextual_cnn.ops import depthwise_conv_triton as depthwise
from contextual_cnn.ops import sampled_conv_triton as sampled
from contextual_cnn.runs.environment import Report, environment

STAGES = {"stage 1": (96, 56), "stage 2": (192, 28), "stage 3": (384, 14), "stage 4": (768, 7)}  # channels, side
GATHERS = dict(positions=(8, 16, 32), chunks=(1, 3, 6), warps=(2, 4, 8))
HATS = dict(points=(32, 64), chunks=(1, 3, 6), warps=(4, 8), stages=(2, 3))
ROWS = [
    dict(rows=rows, columns=columns, channels=channels, warps=4)
    for rows in (4, 7)
    for columns, channels in ((16, 64), (32, 32), (32, 64))
]


class Choice(NamedTuple):
    """A kernel, a layer, and blocks to try."""

    kernel: str
    layer: str
    blocks: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small layer, the first choices: does it run?")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results: dict[str, dict[str, dict]] = {}
    report = Report(arguments.output, environment=environment(), milliseconds=results)
    tried = list(choices())
    if arguments.quick:
        tried = [next(c for c in tried if c.kernel == kernel)._replace(layer="small") for kernel in KERNELS]
    elif arguments.device == "cuda":
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_only, tried, chunksize=4))
    for choice in tried:
        taken = milliseconds(choice, arguments)
        of_layer = results.setdefault(choice.layer, {})
        times = of_layer.get(choice.kernel, {}) | {str(choice.blocks): taken}
        of_layer[choice.kernel] = dict(sorted(times.items(), key=lambda item: item[1] or float("inf")))
        line = {"layer": choice.layer, "kernel": choice.kernel, **choice.blocks, "milliseconds": taken}
        report.add(line, milliseconds=results)
    report.finish()


def choices() -> Iterator[Choice]:
    for layer, (channels, _) in STAGES.items():
        for kernel in ("depthwise", "depthwise, gradient of w"):
            yield from (Choice(kernel, layer, blocks) for blocks in ROWS)
        if layer == "stage 1":  # it has no contextual convolution
            continue
        for kernel, options in (("forward", GATHERS), ("weights and offsets", GATHERS), ("gradient of x", HATS)):
            for values in itertools.product(*options.values()):
                blocks = dict(zip(options, values, strict=True))
                if channels % (64 * blocks["chunks"]) == 0:
                    yield Choice(kernel, layer, blocks)


def compile_only(choice: Choice) -> None:
    """Into Triton's cache, on as many images as are alike for the compiler."""
    milliseconds(choice, argparse.Namespace(batch_size=16, rounds=1, device="cuda"))


def milliseconds(choice: Choice, arguments: argparse.Namespace) -> float | None:
    """None for blocks that the device has no room for."""
    channels, side = STAGES.get(choice.layer, (16, 2))
    make, places = KERNELS[choice.kernel]
    module, names = places
    blocks = module.Blocks(**choice.blocks)
    with mock.patch.multiple(module, **dict.fromkeys(names, blocks)):
        call = make(arguments.batch_size, channels, side, arguments.device)
        try:
            if arguments.device == "cpu":
                return by_kernel([call], arguments.rounds, "cpu")["wall"]
            return replayed(call, arguments.rounds)
        except OutOfResources:
            return None


def maps(batch: int, channels: int, side: int, device: str) -> torch.Tensor:
    """bfloat16 on a GPU, channels innermost."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.randn(batch, side, side, channels, device=device, dtype=dtype).permute(0, 3, 1, 2)


def depthwise_forward(batch: int, channels: int, side: int, device: str) -> Callable[[], object]:
    x, weight = maps(batch, channels, side, device), torch.randn(channels, 1, 7, 7, device=device)
    return lambda: depthwise.forward(x, weight, None, 3, x.dtype)


def depthwise_weight(batch: int, channels: int, side: int, device: str) -> Callable[[], object]:
    x, gy = maps(batch, channels, side, device), maps(batch, channels, side, device)
    return lambda: depthwise.weight_gradient(gy, x, (7, 7), 3)


def sampled_forward(batch: int, channels: int, side: int, device: str) -> Callable[[], object]:
    tensors = layer(batch, channels, side, device)
    return lambda: sampled.forward(*tensors, None, (1, 3, 1))


def weights_and_offsets(batch: int, channels: int, side: int, device: str) -> Callable[[], object]:
    g, inside, points = prepared(*layer(batch, channels, side, device))
    return lambda: sampled._weight_offset_gradients(g, *inside, points)


def gradient_of_x(batch: int, channels: int, side: int, device: str) -> Callable[[], object]:
    g, inside, points = prepared(*layer(batch, channels, side, device))
    return lambda: sampled._input_gradient(g, *inside, points)


def layer(batch: int, channels: int, side: int, device: str) -> tuple[torch.Tensor, ...]:
    """x, weights, and offsets of one pixel."""
    offset = torch.randn(batch, side, side, 98, device=device).permute(0, 3, 1, 2)
    return maps(batch, channels, side, device), torch.randn(batch, channels, 7, 7, device=device), offset


def prepared(x: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor) -> tuple:
    """What the backward pass hands to its kernels, with a random upstream gradient."""
    g = sampled._Geometry(x, weight, offset, None, (1, 3, 1))
    pixels = sampled.pixels(x, x.dtype)
    inside = (torch.randn_like(pixels), pixels, sampled.taps(weight, torch.float32))
    return g, inside, sampled._arranged(offset, None, g)


# How each is called, and the blocks that it takes
KERNELS = {
    "forward": (sampled_forward, (sampled, ("FORWARD",))),
    "weights and offsets": (weights_and_offsets, (sampled, ("WEIGHT_OFFSET", "WEIGHT_OFFSET_EXACT"))),
    "gradient of x": (gradient_of_x, (sampled, ("INPUT", "INPUT_EXACT"))),
    "depthwise": (depthwise_forward, (depthwise, ("FORWARD", "FORWARD_4"))),
    "depthwise, gradient of w": (depthwise_weight, (depthwise, ("WEIGHT",))),
}


if __name__ == "__main__":
    main()

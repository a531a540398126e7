"""Times the Triton kernels with other blocks than the ones they have, at the sizes of the tiny model's layers.

python scripts/dev/tune_kernels.py [--batch-size 128] [--rounds 20] [--output FILE]

JSON: a line with each time, and at the end, for each kernel and layer, the blocks from fastest to slowest, in
milliseconds. What is best overall belongs into
`BLOCKS` of ops/sampled_conv_triton.py. Needs a GPU, torch and triton.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources

from contextual_cnn.ops import sampled_conv_triton as kernels
from contextual_cnn.runs.environment import Report, environment

STAGES = {"stage 2": (192, 28), "stage 3": (384, 14), "stage 4": (768, 7)}  # channels, side
GATHERS = {"positions": (8, 16, 32), "chunks": (1, 3), "warps": (2, 4, 8)}
HATS = {"pixels": (64, 128), "points": (32, 64), "chunks": (1, 2, 3), "hat_warps": (4, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small layer, its first choice: does it run?")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    stages = {"small": (16, 2)} if arguments.quick else STAGES
    results: dict[str, dict] = {stage: {} for stage in stages}
    report = Report(arguments.output, environment=environment(), milliseconds=results)
    for stage, size in stages.items():
        for kernel, blocks, taken in tune_layer(*size, arguments):
            times = results[stage].get(kernel, {}) | {str(blocks): taken}
            results[stage][kernel] = dict(sorted(times.items(), key=lambda item: item[1] or float("inf")))
            report.add({"layer": stage, "kernel": kernel, **blocks, "milliseconds": taken}, milliseconds=results)
    report.finish()


def tune_layer(
    channels: int, side: int, arguments: argparse.Namespace
) -> Iterator[tuple[str, dict[str, int], float | None]]:
    """Every kernel of one layer with every choice of blocks: its name, the blocks, milliseconds."""
    calls = layer_calls(arguments.batch_size, channels, side, arguments.device)
    for kernel, call in calls.items():
        choices = list(candidates(HATS if kernel == "gradient of x" else GATHERS))
        for blocks in choices[:1] if arguments.quick else choices:
            with mock.patch.object(kernels, "BLOCKS", dataclasses.replace(kernels.BLOCKS, **blocks)):
                taken = milliseconds(call, arguments)
            yield kernel, blocks, taken


def candidates(choices: dict[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def layer_calls(batch: int, channels: int, side: int, device: str) -> dict[str, Callable[[], object]]:
    """The three kernels on one layer's tensors: bfloat16 maps on a GPU, offsets of one pixel."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, gy = torch.randn(2, batch, side, side, channels, device=device, dtype=dtype).permute(0, 1, 4, 2, 3)
    weight = torch.randn(batch, channels, 7, 7, device=device)
    offset = torch.randn(batch, side, side, 98, device=device).permute(0, 3, 1, 2)
    geometry = (1, 3, 1)
    g = kernels._Geometry(x, weight, offset, None, geometry)
    inside, upstream = kernels._inside(x, weight, offset, None), gy.permute(0, 2, 3, 1).contiguous()
    return {
        "forward": lambda: kernels.forward(x, weight, offset, None, geometry),
        "gradients of weights and offsets": lambda: kernels._weight_offset_gradients(g, upstream, inside),
        "gradient of x": lambda: kernels._input_gradient(g, upstream, inside),
    }


def milliseconds(call: Callable[[], object], arguments: argparse.Namespace) -> float | None:
    """Median; None for blocks that the device has no room for."""
    synchronize = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    try:
        call()  # compiles
    except OutOfResources:
        return None
    times = []
    for _ in range(arguments.rounds):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(times), 4)


if __name__ == "__main__":
    main()

"""Checks the kernels and the model on a device against float64, and prints JSON; exit status 1 if one fails.

python scripts/dev/gpu_check.py [--device cuda] [--quick] [--output FILE]

A line with each check as it is made, and the whole report at the end.

Needs torch, triton, timm and this package on the path; no Hydra, no W&B, no DALI.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from contextual_cnn.contracts import StagedScores
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model
from contextual_cnn.ops import contextual_conv2d
from contextual_cnn.ops.sampled_conv import implementation_on
from contextual_cnn.optim import build_optimizer
from contextual_cnn.runs.environment import Report, environment
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings

STAGES = {"stage 2": (192, 28), "stage 3": (384, 14), "stage 4": (768, 7)}
# Relative error in norm. bfloat16: rounding the inputs alone costs 2.4e-3, a product of hats or weights as much again
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, for a look whether the checks run")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    checks = []
    found = dict(implementation=implementation_on(torch.device(arguments.device)), environment=environment())
    report = Report(arguments.output, **found, passed=False, checks=checks)
    for check in all_checks(arguments.device, arguments.quick):
        checks.append(check)
        report.add(check, checks=checks)
    passed = all(check["passed"] for check in checks)
    report.finish(passed=passed)
    sys.exit(0 if passed else 1)


def all_checks(device: str, quick: bool) -> Iterator[dict]:
    """Made one by one, as they are asked for."""
    yield from precision(device, quick)
    yield timed("same bits every time", lambda: determinism(device))
    yield timed("compiles whole, training", lambda: compilation(device, training=True))
    yield timed("compiles whole, evaluation", lambda: compilation(device, training=False))
    yield timed("twenty steps of training", lambda: training(device))


def timed(name: str, check: Callable[[], dict]) -> dict:
    """A check's result; one that raises has failed, and the others go on."""
    started = time.perf_counter()
    try:
        result = check()
    except Exception as error:  # whatever goes wrong on a device is the finding
        result = {"passed": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"check": name, "seconds": round(time.perf_counter() - started, 2), **result}


def precision(device: str, quick: bool) -> Iterator[dict]:
    """The op and its gradients, at the model's shapes and at offsets of 0, 1 and 3 pixels, against float64."""
    stages = {"small": (24, 5)} if quick else STAGES
    for (stage, (channels, side)), dtype, spread in product(stages.items(), TOLERANCE, (0.0, 1.0, 3.0)):
        name = f"{stage}, {str(dtype).removeprefix('torch.')}, offsets of {spread:g} pixels"
        yield timed(name, lambda c=channels, s=side, d=dtype, o=spread: compare_with_float64(c, s, d, o, device))


def compare_with_float64(channels: int, side: int, dtype: torch.dtype, spread: float, device: str) -> dict:
    x = torch.randn(2, channels, side, side, device=device).to(dtype)
    tensors = [
        x.contiguous(memory_format=torch.channels_last),
        0.1 * torch.randn(channels, 1, 7, 7, device=device),
        0.1 * torch.randn(2, channels, 7, 7, device=device),
        spread * torch.randn(2, 98, side, side, device=device),
    ]
    upstream = torch.randn(2, channels, side, side, device=device).to(dtype)
    ours = layer(tensors, upstream)
    exact = layer([tensor.double() for tensor in tensors], upstream.double(), "torch")
    errors = {
        name: ((found.double() - truth).norm() / truth.norm()).item()
        for name, found, truth in zip(
            ("y", "x", "weight", "weight_offset", "sampling_offset"), ours, exact, strict=True
        )
    }
    return {"passed": max(errors.values()) < TOLERANCE[dtype], "relative_error": errors}


def layer(tensors: list[Tensor], upstream: Tensor, implementation: str = "auto") -> list[Tensor]:
    """Output and gradients of one contextual convolution."""
    x, weight, weight_offset, sampling_offset = leaves = [t.detach().clone().requires_grad_() for t in tensors]
    offsets = dict(weight_offset=weight_offset, sampling_offset=sampling_offset)
    y = contextual_conv2d(x, weight, **offsets, padding=3, implementation=implementation)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def determinism(device: str) -> dict:
    shapes = ((4, 64, 14, 14), (64, 1, 7, 7), (4, 64, 7, 7), (4, 98, 14, 14))
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    upstream = torch.randn(shapes[0], device=device)
    runs = [layer(tensors, upstream) for _ in range(3)]
    return {"passed": all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))}


def compilation(device: str, training: bool) -> dict:
    """Scores, and in training every parameter's gradient, of the compiled model against those of the plain one."""
    model = (
        build_model(ModelSettings(name="contextual_convnext_atto", num_classes=100, layer_scale=1.0))
        .to(device)
        .train(training)
    )
    images = torch.randn(4, 3, 64, 64, device=device)
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        scores = run(images, staged=True).logits
        parameters = list(model.parameters()) if training else []
        gradients = torch.autograd.grad(sum(s.square().sum() for s in scores), parameters) if training else ()
        results.append(torch.cat([t.detach().flatten() for t in (*scores, *gradients)]))
    error = ((results[1] - results[0]).norm() / results[0].norm()).item()
    return {"passed": error < 1e-2, "relative_error": error}


def training(device: str) -> dict:
    """On one batch, which it should learn by heart."""
    model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=100, layer_scale=0.1)).to(device)
    optimizer, loss = build_optimizer(model, OptimizerSettings(lr=2e-3), global_batch=4096), StagedCrossEntropy()
    images, labels = torch.randn(16, 3, 64, 64, device=device), torch.arange(16, device=device)
    losses = []
    for _ in range(20):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            scores = StagedScores.of(model(images))
        total = loss(scores, labels).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.detach())
    first, last = losses[0].item(), losses[-1].item()
    return {"passed": last < 0.8 * first, "first_loss": first, "last_loss": last}


if __name__ == "__main__":
    main()

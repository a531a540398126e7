"""Everything about kernels and speed that only a GPU can show, the most important first, in one command.

python scripts/dev/gpu_check.py [--budget 480] [--parts correct steps ...] [--output FILE] [--device cuda] [--quick]

A line of JSON with each result as it is made, the whole report at the end; exit status 1 if a check failed. Each part
is a process of its own: one that hangs, or leaves the card in disorder, costs the others nothing but its time. What is
not begun within the budget of seconds is left out, and said so.

    correct    ceilings of the card; the kernels and their gradients against float64, bfloat16 first; the same bits
    steps      training steps of contextual and plain models in turns, compiled and eager, with a profile by kernel
    kernels    each kernel of a contextual layer by itself, at offsets of 0, 1 and 3 pixels
    depthwise  plain depthwise layers, ours and cuDNN's, by type and memory format
    compiled   the compiled model's scores and gradients against the plain one's; twenty steps of training
    sizes      the steps of S, B and ResNet-50
    chain      DALI's graph beside the CPU's, our collectives; training, resume, evaluation: what of it can run there

Needs torch, triton, timm and this package on the path (PYTHONPATH=src); no Hydra, no W&B, no DALI. How to read it:
docs/kernels.md. The whole chain on real images and several GPUs: gpu_first_hour.sh.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_steps import compared_steps
from gpu_timing import by_kernel, replayed
from torch import Tensor
from torch.nn.functional import conv2d

from contextual_cnn.contracts import StagedScores
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model
from contextual_cnn.ops import contextual_conv2d, depthwise_conv2d
from contextual_cnn.ops.implementation import implementation_on
from contextual_cnn.optim import build_optimizer
from contextual_cnn.runs.environment import Report, environment
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings

Findings = Iterator[dict[str, Any]]

STAGES = {"stage 2": (192, 28), "stage 3": (384, 14), "stage 4": (768, 7)}  # of the tiny model: channels, side
PLAIN = {"stage 1": (96, 56), **STAGES}
OFFSET_MAPS = {"offset maps, stage 2": (98, 28), "offset maps, stage 3": (98, 14), "offset maps, stage 4": (98, 7)}
SMALL = {"small": (24, 5)}
SPREADS = (0.0, 1.0, 3.0)  # of the offsets, in pixels
# Relative error in norm. bfloat16: rounding the inputs alone costs 2.4e-3, a product of hats or weights as much again
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}
HERE = Path(__file__).parent


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    if arguments.part is not None:
        for finding in PARTS[arguments.part](arguments):
            print(json.dumps(finding), flush=True)
        return
    deadline = time.monotonic() + arguments.budget
    checks: list[dict] = []
    found = dict(implementation=implementation_on(torch.device(arguments.device)), environment=environment())
    report = Report(arguments.output, **found, passed=False, checks=checks)
    for part in arguments.parts:
        for check in results_of(part, arguments, deadline):
            checks.append({"part": part, **check})
            report.add(checks[-1], checks=checks)
    passed = all(check.get("passed", True) for check in checks)
    report.finish(passed=passed)
    sys.exit(0 if passed else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=480, help="seconds, after which nothing is begun or waited for")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="small shapes, for a look whether the checks run")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what the processes are called with
    return parser.parse_args()


def results_of(part: str, arguments: argparse.Namespace, deadline: float) -> Findings:
    """What a part's process prints, and how it ended if not well."""
    left = deadline - time.monotonic()
    if left <= 0:
        yield {"left_out": "the budget is spent"}
        return
    command = [sys.executable, __file__, "--part", part, "--device", arguments.device]
    command += ["--batch-size", str(arguments.batch_size), *(["--quick"] if arguments.quick else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(left, process.kill)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)
    status = process.wait()
    if not timer.is_alive():
        yield {"incomplete": f"ended after {left:.0f} s, when the budget was spent"}
    elif status != 0:
        yield {"passed": False, "error": f"the part ended with status {status}"}
    timer.cancel()


def timed(name: str, check: Callable[[], dict]) -> dict:
    """A check's result; one that raises has failed, and the others go on."""
    started = time.perf_counter()
    try:
        result = check()
    except Exception as error:  # whatever goes wrong on a device is the finding
        result = {"passed": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"check": name, "seconds": round(time.perf_counter() - started, 2), **result}


def correct(arguments: argparse.Namespace) -> Findings:
    device = arguments.device
    if device != "cpu":
        yield timed("ceilings", ceilings)
    stages, plain = (SMALL, SMALL) if arguments.quick else (STAGES, PLAIN)
    for dtype in TOLERANCE:
        for (stage, size), spread in product(stages.items(), SPREADS):
            name = f"{stage}, {short(dtype)}, offsets of {spread:g} pixels"
            yield timed(name, partial(contextual_error, *size, dtype, spread, device))
        maps = plain if dtype == torch.bfloat16 or arguments.quick else OFFSET_MAPS
        for layer, size in maps.items():
            yield timed(f"depthwise {layer}, {short(dtype)}", partial(depthwise_error, *size, dtype, device))
    yield timed("same bits every time", partial(determinism, device))


def ceilings() -> dict:
    """Bytes read and written by a copy, and a product of matrices."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = replayed(lambda: target.copy_(source), 10)
    side = 8192
    matrix = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    product_ = replayed(lambda: matrix @ matrix, 10)
    return {
        "device": torch.cuda.get_device_name(),
        "copy_tb_s": round(2 * len(source) / copy / 1e9, 2),
        "matmul_tflops": round(2 * side**3 / product_ / 1e9),
    }


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def contextual_error(channels: int, side: int, dtype: torch.dtype, spread: float, device: str) -> dict:
    """The op and its gradients on two images, against float64 and plain torch."""
    leaves, upstream = contextual_layer(2, channels, side, dtype, spread, device)
    ours = gradients(partial(contextual, implementation="auto"), leaves, upstream)
    exact = gradients(partial(contextual, implementation="torch"), [t.double() for t in leaves], upstream.double())
    return compared(("y", "x", "weight", "weight_offset", "sampling_offset"), ours, exact, TOLERANCE[dtype])


def depthwise_error(channels: int, side: int, dtype: torch.dtype, device: str) -> dict:
    x, weight, upstream = plain_layer(2, channels, side, dtype, device)
    ours = gradients(partial(depthwise_conv2d, padding=3), [x, weight], upstream)
    exact = gradients(partial(plain_conv, groups=channels), [x.double(), weight.double()], upstream.double())
    return compared(("y", "x", "weight"), ours, exact, TOLERANCE[dtype])


def contextual_layer(
    batch: int, channels: int, side: int, dtype: torch.dtype, spread: float, device: str
) -> tuple[list[Tensor], Tensor]:
    """x, weight, weight_offset and sampling_offset as under autocast; and an upstream gradient."""
    x = torch.randn(batch, channels, side, side, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    offset = spread * torch.randn(batch, 98, side, side, device=device).contiguous(memory_format=torch.channels_last)
    weight_offset = 0.1 * torch.randn(batch, channels, 7, 7, device=device)
    return [x, 0.1 * torch.randn(channels, 1, 7, 7, device=device), weight_offset, offset], torch.randn_like(x)


def contextual(x: Tensor, weight: Tensor, weight_offset: Tensor, sampling_offset: Tensor, **options: Any) -> Tensor:
    offsets = dict(weight_offset=weight_offset, sampling_offset=sampling_offset)
    return contextual_conv2d(x, weight, **offsets, padding=3, **options)


def plain_layer(
    batch: int, channels: int, side: int, dtype: torch.dtype, device: str, memory_format: Any = torch.channels_last
) -> tuple[Tensor, Tensor, Tensor]:
    """x, a float32 weight, and an upstream gradient."""
    x = torch.randn(batch, channels, side, side, device=device).to(dtype).contiguous(memory_format=memory_format)
    return x, torch.randn(channels, 1, 7, 7, device=device), torch.randn_like(x)


def plain_conv(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    return conv2d(x, weight.to(x.dtype), padding=3, groups=groups)


def gradients(call: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def compared(names: tuple[str, ...], ours: list[Tensor], exact: list[Tensor], tolerance: float) -> dict:
    errors = {
        name: float(f"{((found.double() - truth).norm() / truth.norm()).item():.2e}")
        for name, found, truth in zip(names, ours, exact, strict=True)
    }
    return {"passed": max(errors.values()) < tolerance, "relative_error": errors}


def determinism(device: str) -> dict:
    leaves, upstream = contextual_layer(4, 64, 14, torch.float32, 1.0, device)
    runs = [gradients(contextual, leaves, upstream) for _ in range(3)]
    return {"passed": all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))}


def steps(arguments: argparse.Namespace) -> Findings:
    """Of the tiny model: with our depthwise convolutions and cuDNN's, beside timm's plain one."""
    name = "atto" if arguments.quick else "tiny"
    twin = (f"convnext_{name}", "cudnn")
    for compiled in (False,) if arguments.quick else (True, False):
        candidates = [twin, (f"contextual_convnext_{name}", "ours"), (f"convnext_{name}", "ours")]
        yield from compared_steps(candidates, compiled, arguments)


def sizes(arguments: argparse.Namespace) -> Findings:
    for name in () if arguments.quick else ("convnext_small", "convnext_base", "resnet50"):
        yield from compared_steps([(name, "cudnn"), (f"contextual_{name}", "ours")], True, arguments)


def kernels(arguments: argparse.Namespace) -> Findings:
    dtype = torch.bfloat16 if arguments.device != "cpu" else torch.float32
    for (stage, size), spread in product((SMALL if arguments.quick else STAGES).items(), SPREADS):
        layers = [contextual_layer(arguments.batch_size, *size, dtype, spread, arguments.device) for _ in range(3)]
        calls = [partial(gradients, contextual, *layer) for layer in layers]
        name = f"{stage}, offsets of {spread:g} pixels"
        yield timed(name, lambda calls=calls: {"milliseconds": by_kernel(calls, 6, arguments.device)})


def depthwise(arguments: argparse.Namespace) -> Findings:
    """Forward and both gradients, all kernels together."""
    layers = SMALL if arguments.quick else PLAIN | OFFSET_MAPS
    for (layer, size), dtype in product(layers.items(), (torch.bfloat16, torch.float32)):
        rows = {
            "ours": (partial(depthwise_conv2d, padding=3), torch.channels_last),
            "torch, channels_last": (partial(plain_conv, groups=size[0]), torch.channels_last),
            "torch, channels first": (partial(plain_conv, groups=size[0]), torch.contiguous_format),
        }
        yield timed(f"{layer}, {short(dtype)}", partial(depthwise_times, size, dtype, rows, arguments))


def depthwise_times(size: tuple[int, int], dtype: torch.dtype, rows: dict, arguments: argparse.Namespace) -> dict:
    found = {}
    for who, (call, memory_format) in rows.items():
        made = [plain_layer(arguments.batch_size, *size, dtype, arguments.device, memory_format) for _ in range(3)]
        forward = [partial(call, x, weight) for x, weight, _ in made]
        both = [partial(gradients, call, [x, weight], upstream) for x, weight, upstream in made]
        times = {"forward": forward, "with gradients": both}
        found[who] = {k: round(sum(by_kernel(v, 6, arguments.device).values()), 4) for k, v in times.items()}
    return {"milliseconds": found}


def compiled(arguments: argparse.Namespace) -> Findings:
    yield timed("compiles whole, training", partial(compilation, arguments.device, training=True))
    yield timed("compiles whole, evaluation", partial(compilation, arguments.device, training=False))
    yield timed("twenty steps of training", partial(twenty_steps, arguments.device))


def compilation(device: str, training: bool) -> dict:
    """Scores, and in training every parameter's gradient, of the compiled model against those of the plain one."""
    settings = ModelSettings(name="contextual_convnext_atto", num_classes=100, layer_scale=1.0)
    model = build_model(settings).to(device).train(training)
    images = torch.randn(4, 3, 64, 64, device=device)
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        scores = run(images, staged=True).logits
        parameters = list(model.parameters()) if training else []
        grads = torch.autograd.grad(sum(s.square().sum() for s in scores), parameters) if training else ()
        results.append(torch.cat([t.detach().flatten() for t in (*scores, *grads)]))
    error = ((results[1] - results[0]).norm() / results[0].norm()).item()
    return {"passed": error < 1e-2, "relative_error": error}


def twenty_steps(device: str) -> dict:
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


def chain(arguments: argparse.Namespace) -> Findings:
    """Other scripts' findings. Processes: as many as there are GPUs."""
    if find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None:
        yield from relayed("dali", [sys.executable, str(HERE / "check_dali.py"), "--device", arguments.device])
    else:
        yield {"check": "dali", "left_out": "it is not installed"}
    count = torch.cuda.device_count() if arguments.device == "cuda" else 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    collectives = [*torchrun, str(HERE / "check_collectives.py"), "--device", arguments.device]
    yield from relayed("collectives", collectives + (["--numbers", "1000000"] if arguments.quick else []))
    if find_spec("hydra") is not None and not arguments.quick:
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parents[1] / "tests")]
        yield from relayed("pytest -m gpu", tests)


def relayed(name: str, command: list[str]) -> Findings:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield {"of": name, **json.loads(line)}
    yield {"of": name, "passed": process.wait() == 0}


PARTS = {
    part.__name__: part for part in (correct, steps, kernels, depthwise, compiled, sizes, chain)
}  # the most important first


if __name__ == "__main__":
    main()

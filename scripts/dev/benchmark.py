"""Times the contextual convolution, a training step, the loss and the loader, each beside what it is compared with.

python scripts/dev/benchmark.py op|model|clips|loss|table1|data [--model tiny] [--batch-size N] [--output FILE]

Prints a line of JSON with each result, and the whole report at the end. As in training, maps are bfloat16 on a GPU and
float32 on a CPU, and what else a layer is given has the type that the model gives it.

The candidates take turns, round by round, so that a machine that slows down slows all of them; a turn is as many calls
as fit into a fifth of a second, at least one, and counts with its median. Each figure is the median over the rounds,
and the ratios are medians of the ratios within a round.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torchvision.ops import deform_conv2d

from contextual_cnn.analysis.comparison import describe_family
from contextual_cnn.contracts import StagedScores
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model
from contextual_cnn.models.temporal_shift import fit_to_clips
from contextual_cnn.ops import contextual_conv2d
from contextual_cnn.optim import build_optimizer
from contextual_cnn.runs.environment import Report, environment
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings

Findings = Iterator[tuple[Sequence[str], Any]]  # where in the results each belongs, and what it is

TURN = 0.2  # seconds
STAGES = {"stage 2": (192, 28), "stage 3": (384, 14), "stage 4": (768, 7)}  # of the tiny model: channels, side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["op", "model", "clips", "loss", "table1", "data"])
    parser.add_argument("--model", default="tiny", choices=["atto", "tiny", "small", "base"])
    parser.add_argument("--batch-size", type=int, help="8, 64 for data, 1 clip of 8 frames")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the maps; bfloat16 unless on a CPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--released", action="store_true", help="time the released code's formulation as well (minutes)"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or {"data": 64, "clips": 1}.get(arguments.what, 8)
    arguments.dtype = arguments.dtype or default_dtype(arguments.device)
    torch.set_float32_matmul_precision("high")  # both as train.py has them
    torch.backends.cudnn.benchmark = True
    benchmarks = {
        "op": benchmark_op,
        "model": benchmark_model,
        "clips": benchmark_clips,
        "loss": benchmark_loss,
        "table1": benchmark_table1,
        "data": benchmark_data,
    }
    results = {}
    settings = {k: str(v) for k, v in vars(arguments).items()}
    report = Report(arguments.output, settings=settings, environment=environment(), results=results)
    for place, finding in benchmarks[arguments.what](arguments):
        results = put(results, place, finding)
        report.add({" / ".join(place) or arguments.what: finding}, results=results)
    report.finish()


def default_dtype(device: str) -> str:
    """What trainer.precision=auto computes in."""
    return "float32" if device == "cpu" else "bfloat16"


def put(results: dict, place: Sequence[str], finding: Any) -> Any:
    """The results with a finding at its place; one without a place is all of them."""
    if not place:
        return finding
    first, *rest = place
    return results | {first: put(results.get(first, {}), rest, finding)}


def benchmark_op(arguments: argparse.Namespace) -> Findings:
    """Forward and backward of one layer at the sizes of each contextual stage, offsets of one pixel."""
    for stage, (channels, side) in STAGES.items():
        for name, finding in _time_layer(layer_tensors(channels, side, arguments), arguments):
            yield (stage, name), finding


def layer_tensors(channels: int, side: int, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What a 7x7 layer is given under autocast: the map and what ends in a Linear are low, all else is float32."""
    batch, low = arguments.batch_size, getattr(torch, arguments.dtype)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        tensor = torch.randn(shape, device=arguments.device).to(dtype)
        last = tensor.ndim == 4 and shape[1] > 1
        return (tensor.contiguous(memory_format=torch.channels_last) if last else tensor).requires_grad_()

    return {
        "x": leaf(batch, channels, side, side, dtype=low),
        "weight": leaf(channels, 1, 7, 7),
        "bias": leaf(channels),
        "weight_offset": leaf(batch, channels, 7, 7, dtype=low),
        "sampling_offset": leaf(batch, 98, side, side),
    }


def _time_layer(tensors: dict[str, torch.Tensor], arguments: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    x, weight, bias, *_ = given = list(tensors.values())
    upstream = torch.randn_like(x)

    def contextual(implementation: str = "auto") -> torch.Tensor:
        return contextual_conv2d(**tensors, padding=3, implementation=implementation)

    def plain() -> torch.Tensor:
        static, shift = weight.to(x.dtype), bias.to(x.dtype)
        return torch.nn.functional.conv2d(x, static, shift, padding=3, groups=x.shape[1])

    forwards = {
        "contextual": contextual,
        "plain depthwise": plain,
        "contextual, plain torch": lambda: contextual("torch"),
    }
    if arguments.released:
        forwards["torchvision, as released"] = _with_torchvision(contextual)

    def with_backward(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
        # Gradients handed out, not added to those of the call before
        return lambda: torch.autograd.grad(forward(), given, upstream, allow_unused=True)

    both = {name: with_backward(forward) for name, forward in forwards.items()}
    yield "dtypes", {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    yield "forward", time_side_by_side(forwards, "contextual", arguments)
    yield "forward and backward", time_side_by_side(both, "contextual", arguments)
    kept = {name: round(kept_for_backward(forward, given) / x.nbytes, 2) for name, forward in forwards.items()}
    yield "kept_for_backward_over_input", kept


def torchvision_conv(x, weight, offset, mask, geometry, implementation) -> torch.Tensor:
    """The released code's formulation of `sampled_conv2d`: every (sample, channel) is a group of its own.

    In float32 at least, which is also what autocast makes of torchvision's operator.
    """
    batch, channels = x.shape[:2]
    exact = torch.promote_types(x.dtype, torch.float32)
    y = deform_conv2d(
        x.to(exact).reshape(1, batch * channels, *x.shape[2:]),
        offset.to(exact).reshape(1, -1, *offset.shape[2:]),
        weight.to(exact).flatten(0, 1).unsqueeze(1),
        None,
        *geometry,
        mask=mask.to(exact).reshape(1, -1, *mask.shape[2:]) if mask is not None else None,
    )
    return y.view(batch, channels, *y.shape[2:]).to(x.dtype)


def benchmark_model(arguments: argparse.Namespace) -> Findings:
    """A training step (forward, staged loss, backward, AdamW) and inference, beside the plain twin's."""
    contextual, plain = f"contextual_convnext_{arguments.model}", f"convnext_{arguments.model}"
    steps, inferences = {}, {}
    for name in (contextual, plain):
        steps[name], inferences[name] = _training_and_inference(name, arguments)
    if arguments.released:
        steps["as released"], inferences["as released"] = (
            _with_torchvision(f[contextual]) for f in (steps, inferences)
        )
    yield ("training step",), time_side_by_side(steps, contextual, arguments)
    yield ("inference",), time_side_by_side(inferences, contextual, arguments)
    yield ("activations_mib",), {name: kept_for_backward(step, []) // 2**20 for name, step in steps.items()}
    yield ("peak_memory_of_the_process_mib",), _peak_memory(arguments.device)


def benchmark_clips(arguments: argparse.Namespace) -> Findings:
    """Clips of 8 frames in ResNet-50 with the temporal shift: training step and inference, beside the plain twin's."""
    contextual, plain = "contextual_resnet50", "resnet50"
    clip = ClipSettings()
    pairs = {name: _training_and_inference(name, arguments, clip) for name in (contextual, plain)}
    for i, what in enumerate(("training step", "inference")):
        found = time_side_by_side({name: pair[i] for name, pair in pairs.items()}, contextual, arguments)
        speeds = {name: round(1e3 * arguments.batch_size / ms, 3) for name, ms in found["milliseconds"].items()}
        yield (what,), found | {"clips_per_second": speeds}


def _training_and_inference(
    name: str, arguments: argparse.Namespace, clip: ClipSettings | None = None
) -> tuple[Callable, Callable]:
    """clip: the batch is of clips, frame by frame, and the scores are of frames."""
    model = build_model(ModelSettings(name=name, num_classes=400 if clip else 1000))
    if clip is not None:
        fit_to_clips(model, clip)
    model = model.to(arguments.device, memory_format=torch.channels_last)
    batch = arguments.batch_size * (clip.frames if clip else 1)
    optimizer, loss = build_optimizer(model, OptimizerSettings(), global_batch=4096), StagedCrossEntropy()
    run = torch.compile(model) if arguments.compile else model
    images = torch.randn(batch, 3, arguments.image_size, arguments.image_size, device=arguments.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(400 if clip else 1000, (batch,), device=arguments.device)
    kind, low = torch.device(arguments.device).type, arguments.dtype == "bfloat16"
    autocast = torch.autocast(kind, torch.bfloat16, enabled=low)

    def step() -> None:
        model.train()
        with autocast:
            scores = StagedScores.of(run(images))
        loss(scores, labels).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        model.eval()
        with autocast, torch.inference_mode():
            run(images)

    return step, infer


def benchmark_loss(arguments: argparse.Namespace) -> Findings:
    """The staged loss of four stages of 1000 classes, forward and backward, hard and soft targets."""
    logits = tuple(torch.randn(arguments.batch_size, 1000, device=arguments.device).requires_grad_() for _ in range(4))
    hard = torch.randint(1000, (arguments.batch_size,), device=arguments.device)
    soft = torch.softmax(torch.randn(arguments.batch_size, 1000, device=arguments.device), dim=1)
    loss, scores = StagedCrossEntropy(), StagedScores(logits, (), (1, 2, 3, 4))
    candidates = {
        "soft targets": lambda: loss(scores, soft).total.backward(),
        "hard targets": lambda: loss(scores, hard).total.backward(),
    }
    yield (), time_side_by_side(candidates, "soft targets", arguments)


def benchmark_table1(arguments: argparse.Namespace) -> Findings:
    """The rows of the paper's table 1 of one size: what a model costs, and inference beside twin and peers."""
    twin = f"convnext_{arguments.model}"
    rows = describe_family(twin, arguments.image_size)
    yield (), rows
    inferences = {row["model"]: _training_and_inference(row["model"], arguments)[1] for row in rows}
    times = time_side_by_side(inferences, f"contextual_{twin}", arguments)["milliseconds"]
    speeds = {name: round(1e3 * arguments.batch_size / time, 1) for name, time in times.items()}
    yield (), [{**row, "images_per_second": speeds[row["model"]]} for row in rows]


def benchmark_data(arguments: argparse.Namespace) -> Findings:
    """Our loaders and timm's."""
    from benchmark_loaders import time_loaders  # needs DALI and scikit-learn, which a machine with a GPU may lack

    for recipe, finding in time_loaders(arguments):
        yield (recipe,), finding


def time_side_by_side(candidates: dict[str, Callable[[], object]], ours: str, arguments: argparse.Namespace) -> dict:
    """Median milliseconds of each candidate, and our time over that of each other."""
    rounds = [
        {name: _milliseconds(candidate, arguments.device) for name, candidate in candidates.items()}
        for _ in range(arguments.rounds + 1)
    ][1:]  # the first one warms up
    return {
        "milliseconds": {name: round(statistics.median(r[name] for r in rounds), 3) for name in candidates},
        "ratios": {
            f"{ours} / {name}": round(statistics.median(r[ours] / r[name] for r in rounds), 4)
            for name in candidates
            if name != ours
        },
    }


def _milliseconds(candidate: Callable[[], object], device: str) -> float:
    """One turn: the median of its calls."""
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    times = []
    while sum(times) < TURN:
        synchronize()
        started = time.perf_counter()
        candidate()
        synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def kept_for_backward(forward: Callable[[], object], given: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, beyond those of the given tensors."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(sizes.values()) - sum(sizes.get(tensor.untyped_storage().data_ptr(), 0) for tensor in given)


def _with_torchvision(candidate: Callable) -> Callable:
    def run() -> object:
        with mock.patch("contextual_cnn.ops.contextual_convolution.sampled_conv2d", torchvision_conv):
            return candidate()

    return run


def _peak_memory(device: str) -> int:
    """Of the whole process, all candidates together."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()

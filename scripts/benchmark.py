"""Times the contextual convolution, a training step, the loss and the loader, each beside what it is compared with.

python scripts/benchmark.py op|model|loss|data [--model tiny] [--batch-size N] [--rounds 5] [--output FILE]

Prints JSON. The candidates take turns, round by round, so that a machine that slows down slows all of them; each
figure is the median over the rounds, and the ratios are medians of the ratios within a round.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import timm.data
import torch
from PIL import Image
from torchvision.ops import deform_conv2d

from contextual_cnn.contracts import StagedScores
from contextual_cnn.data import Augmentation, ImageData
from contextual_cnn.data.augmentation import BatchAugmentation
from contextual_cnn.data.randaugment.pil_ops import posterize
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import World
from contextual_cnn.engine.environment import environment, print_report
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model
from contextual_cnn.ops import contextual_conv2d
from contextual_cnn.optim import build_optimizer

GRAIN = 16  # standard deviation, in levels
STAGES = {"stage 2": (192, 28), "stage 3": (384, 14), "stage 4": (768, 7)}  # of the tiny model: channels, side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["op", "model", "loss", "data"])
    parser.add_argument("--model", default="tiny", choices=["atto", "tiny", "small", "base"])
    parser.add_argument("--batch-size", type=int, help="8, and 64 for data")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--released", action="store_true", help="time the released code's formulation as well (minutes)"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or (64 if arguments.what == "data" else 8)
    benchmarks = {"op": benchmark_op, "model": benchmark_model, "loss": benchmark_loss, "data": benchmark_data}
    results = benchmarks[arguments.what](arguments)
    report = {
        "settings": {k: str(v) for k, v in vars(arguments).items()},
        "environment": environment(),
        "results": results,
    }
    print_report(report, arguments.output)


def benchmark_op(arguments: argparse.Namespace) -> dict:
    """Forward and backward of one layer at the sizes of each contextual stage, offsets of one pixel."""
    return {stage: _time_layer(channels, side, arguments) for stage, (channels, side) in STAGES.items()}


def _time_layer(channels: int, side: int, arguments: argparse.Namespace) -> dict:
    def leaf(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, device=arguments.device)
        last = tensor.ndim == 4 and shape[1] > 1
        return (tensor.contiguous(memory_format=torch.channels_last) if last else tensor).requires_grad_()

    batch = arguments.batch_size
    x, weight, bias = leaf(batch, channels, side, side), leaf(channels, 1, 7, 7), leaf(channels)
    offsets = {"weight_offset": leaf(batch, channels, 7, 7), "sampling_offset": leaf(batch, 98, side, side)}
    upstream = torch.randn_like(x)

    def contextual() -> torch.Tensor:
        return contextual_conv2d(x, weight, bias, **offsets, padding=3)

    forwards = {
        "contextual": contextual,
        "plain depthwise": lambda: torch.nn.functional.conv2d(x, weight, bias, padding=3, groups=channels),
        "contextual, plain torch": _in_plain_torch(contextual),
    }
    if arguments.released:
        forwards["torchvision, as released"] = _with_torchvision(contextual)
    both = {name: lambda f=forward: f().backward(upstream) for name, forward in forwards.items()}
    given = [x, weight, bias, *offsets.values()]
    return {
        "forward": compare(forwards, "contextual", arguments),
        "forward and backward": compare(both, "contextual", arguments),
        "kept_for_backward_over_input": {
            name: round(kept_for_backward(forward, given) / x.nbytes, 2) for name, forward in forwards.items()
        },
    }


def torchvision_conv(x, weight, offset, mask, geometry) -> torch.Tensor:
    """The released code's formulation of `sampled_conv2d`: every (sample, channel) is a group of its own."""
    batch, channels = x.shape[:2]
    y = deform_conv2d(
        x.reshape(1, batch * channels, *x.shape[2:]),
        offset.reshape(1, -1, *offset.shape[2:]),
        weight.flatten(0, 1).unsqueeze(1),
        None,
        *geometry,
        mask=mask.reshape(1, -1, *mask.shape[2:]) if mask is not None else None,
    )
    return y.view(batch, channels, *y.shape[2:])


def benchmark_model(arguments: argparse.Namespace) -> dict:
    """A training step (forward, staged loss, backward, AdamW) and inference, beside the plain twin's."""
    contextual, plain = f"contextual_convnext_{arguments.model}", f"convnext_{arguments.model}"
    steps, inferences = {}, {}
    for name in (contextual, plain):
        steps[name], inferences[name] = _training_and_inference(name, arguments)
    if arguments.released:
        steps["as released"], inferences["as released"] = (
            _with_torchvision(f[contextual]) for f in (steps, inferences)
        )
    return {
        "training step": compare(steps, contextual, arguments),
        "inference": compare(inferences, contextual, arguments),
        "activations_mib": {name: kept_for_backward(step, []) // 2**20 for name, step in steps.items()},
        "peak_memory_of_the_process_mib": _peak_memory(arguments.device),
    }


def _training_and_inference(name: str, arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    model = build_model(name=name, num_classes=1000).to(arguments.device, memory_format=torch.channels_last)
    optimizer, loss = build_optimizer(model), StagedCrossEntropy()
    run = torch.compile(model) if arguments.compile else model
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=arguments.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (arguments.batch_size,), device=arguments.device)
    autocast = torch.autocast(torch.device(arguments.device).type, torch.bfloat16, enabled=arguments.device != "cpu")

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


def benchmark_loss(arguments: argparse.Namespace) -> dict:
    """The staged loss of four stages of 1000 classes, forward and backward, hard and soft targets."""
    logits = tuple(torch.randn(arguments.batch_size, 1000, device=arguments.device).requires_grad_() for _ in range(4))
    hard = torch.randint(1000, (arguments.batch_size,), device=arguments.device)
    soft = torch.softmax(torch.randn(arguments.batch_size, 1000, device=arguments.device), dim=1)
    loss = StagedCrossEntropy()
    candidates = {
        "soft targets": lambda: loss(StagedScores(logits), soft).total.backward(),
        "hard targets": lambda: loss(StagedScores(logits), hard).total.backward(),
    }
    return compare(candidates, "soft targets", arguments)


def benchmark_data(arguments: argparse.Namespace) -> dict:
    """Our loader and timm's on the same JPEGs: the whole recipe but mixing, and crop and flip alone."""
    recipes = {
        "full recipe": Augmentation(),
        "crop and flip": Augmentation(randaugment=None, color_jitter=0.0, erasing=0.0),
    }
    with tempfile.TemporaryDirectory() as folder:
        root = write_photos(Path(folder), images=512)
        return {name: _compare_loaders(root, augmentation, arguments) for name, augmentation in recipes.items()}


def write_photos(root: Path, images: int) -> Path:
    """500 x 375 JPEGs of quality 92, parts of two photographs, with grain: as large as ImageNet's mean, 110 kB."""
    from sklearn.datasets import load_sample_images  # only here: it is no part of a training environment

    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for i in range(images):
        path = root / "train" / f"class_{i % 4}" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        top, left = rng.integers(0, 427 - 375), rng.integers(0, 640 - 500)
        part = photos[i % 2][top : top + 375, left : left + 500] + rng.normal(0, GRAIN, (375, 500, 3))
        Image.fromarray(part.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return root


def _compare_loaders(root: Path, augmentation: Augmentation, arguments: argparse.Namespace) -> dict:
    """The loaders take turns; a turn starts with all queues full, uses its own up, and is timed in what follows."""
    stock, timed = 6, 8  # batches; no loader here is further ahead than 4
    loaders = {
        "ours, DALI": _our_batches(root, augmentation, arguments),
        "timm": _timm_batches(root, augmentation, arguments),
    }
    rounds = []
    for _ in range(arguments.rounds + 1):
        turn = {}
        for name, batches in loaders.items():
            _wait_for_full_queues()
            for _ in range(stock):
                next(batches)
            cpu, started = _cpu_seconds(), time.perf_counter()
            for _ in range(timed):
                next(batches)
            images = timed * arguments.batch_size
            turn[name] = (images / (time.perf_counter() - started), 1e3 * (_cpu_seconds() - cpu) / images)
        rounds.append(turn)
    return _summarise_loaders(rounds[1:])  # the first one warms up


def _summarise_loaders(rounds: list[dict]) -> dict:
    def median(value: Callable[[dict], float], digits: int) -> float:
        return round(statistics.median(value(turn) for turn in rounds), digits)

    ours, *others = rounds[0]
    return {
        "images_per_second": {name: median(lambda turn, n=name: turn[n][0], 1) for name in rounds[0]},
        "cpu_ms_per_image": {name: median(lambda turn, n=name: turn[n][1], 3) for name in rounds[0]},
        "speed_ratios": {f"{ours} / {n}": median(lambda turn, n=n: turn[ours][0] / turn[n][0], 3) for n in others},
        "cpu_ratios": {f"{n} / {ours}": median(lambda turn, n=n: turn[n][1] / turn[ours][1], 3) for n in others},
    }


def _our_batches(root: Path, augmentation: Augmentation, arguments: argparse.Namespace) -> Iterator:
    data = ImageData(("train",), root=str(root), image_size=arguments.image_size)
    plan = BatchPlan.make(
        images=len(data.folders["train"]),
        global_batch=arguments.batch_size,
        micro_batch=arguments.batch_size,
        world_size=1,
    )
    world = World(0, 1, 0, torch.device(arguments.device))
    erase = BatchAugmentation(replace(augmentation, mixup=0.0, cutmix=0.0, label_smoothing=0.0), data.num_classes)
    for batch in data.train_batches(plan, augmentation, 0, world, 0):
        yield erase(batch)


def _timm_batches(root: Path, augmentation: Augmentation, arguments: argparse.Namespace) -> Iterator:
    """timm's own loader with its defaults, a worker per core, over an epoch that does not end within the benchmark."""
    dataset = timm.data.ImageDataset(str(root / "train"))
    dataset.reader.samples = dataset.reader.samples * 1000
    # Pillow 13 refuses to keep no bits, which timm 1.0.31 asks for; older versions make a black image of it
    black = {"PosterizeIncreasing": posterize}
    with mock.patch.dict("timm.data.auto_augment.NAME_TO_OP", black):
        loader = timm.data.create_loader(
            dataset,
            (3, arguments.image_size, arguments.image_size),
            arguments.batch_size,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.randaugment,
            re_prob=augmentation.erasing,
            re_mode="pixel",
            interpolation="bicubic",
            num_workers=len(os.sched_getaffinity(0)),
            device=torch.device(arguments.device),
        )
    return iter(loader)


def _wait_for_full_queues() -> None:
    """Returns when no loader has been working for a moment."""
    before = -1.0
    while _cpu_seconds() - before > 0.02:
        before = _cpu_seconds()
        time.sleep(0.3)


def _cpu_seconds() -> float:
    """Of this process and its workers, which are still running (Linux)."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def compare(candidates: dict[str, Callable[[], object]], ours: str, arguments: argparse.Namespace) -> dict:
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
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    candidate()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


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


def _in_plain_torch(candidate: Callable) -> Callable:
    def run() -> object:
        with mock.patch.dict("os.environ", CONTEXTUAL_CNN_OPS="torch"):
            return candidate()

    return run


def _with_torchvision(candidate: Callable) -> Callable:
    def run() -> object:
        with mock.patch("contextual_cnn.ops.contextual_conv.sampled_conv2d", torchvision_conv):
            return candidate()

    return run


def _peak_memory(device: str) -> int:
    """Of the whole process, all candidates together."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()

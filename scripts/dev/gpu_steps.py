"""Training steps of several models in turns, each in a process of its own: a ratio is of one card in one minute.

A process compiles while the others do; then each makes a few steps when it is told to. For gpu_check.py.
"""

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_timing import by_kernel

from contextual_cnn.contracts import StagedScores
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model
from contextual_cnn.optim import build_optimizer
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings

LOCK = Path(tempfile.gettempdir()) / "gpu_steps.lock"
ROUNDS, STEPS = 5, 10
KERNELS = 40  # of a profile, the longest


def compared_steps(candidates: list[tuple[str, str]], compiled: bool, arguments: argparse.Namespace) -> Iterator[dict]:
    """Milliseconds a step of each (model, depthwise), and over the first one's; then a profile of each."""
    workers = {candidate: Worker(*candidate, compiled, arguments) for candidate in candidates}
    try:
        for candidate, worker in workers.items():
            yield {"of": label(candidate, compiled), **worker.answer()}
        rounds = [{c: worker.ask("steps") for c, worker in workers.items()} for _ in range(ROUNDS)]
        first = candidates[0]
        for candidate in candidates:
            ratios = [r[candidate]["milliseconds"] / r[first]["milliseconds"] for r in rounds]
            times = [r[candidate]["milliseconds"] for r in rounds]
            yield {
                "of": label(candidate, compiled),
                "milliseconds": statistics.median(times),
                "images_per_second": round(1e3 * arguments.batch_size / statistics.median(times)),
                f"over {label(first, compiled)}": round(statistics.median(ratios), 4),
                "host_milliseconds": rounds[-1][candidate]["host_milliseconds"],
                "peak_gib": rounds[-1][candidate]["peak_gib"],
            }
        for candidate, worker in workers.items():
            yield {"profile_of": label(candidate, compiled), **worker.ask("profile")}
    finally:
        for worker in workers.values():
            worker.process.kill()


def label(candidate: tuple[str, str], compiled: bool) -> str:
    name, depthwise = candidate
    return f"{name}, depthwise {depthwise}, {'compiled' if compiled else 'eager'}"


class Worker:
    """A process with a model."""

    def __init__(self, name: str, depthwise: str, compiled: bool, arguments: argparse.Namespace) -> None:
        settings = dict(name=name, depthwise=depthwise, compiled=compiled, device=arguments.device)
        settings |= dict(batch=2, size=64) if arguments.quick else dict(batch=arguments.batch_size, size=224)
        command = [sys.executable, __file__, json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Raises:
        RuntimeError: the process has ended; what it said is on its stderr.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a model's process ended with status {self.process.wait()}")


def work(name: str, depthwise: str, compiled: bool, device: str, batch: int, size: int) -> None:
    """What a worker's process does."""
    torch.set_float32_matmul_precision("high")  # both as train.py has them
    torch.backends.cudnn.benchmark = True
    started = time.perf_counter()
    model = build_model(ModelSettings(name=name, num_classes=1000, drop_path_rate=0.1, depthwise=depthwise))
    model = model.to(device, memory_format=torch.channels_last).train()
    step = training_step(model, model, device, batch, size)
    with LOCK.open("w") as lock:  # what cuDNN finds fastest, it finds alone on the card
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(2):
            step()
        synchronize(device)
    if compiled:
        step = training_step(model, torch.compile(model), device, batch, size)
        step()
        synchronize(device)
    say({"ready_after_s": round(time.perf_counter() - started, 1)})
    for line in sys.stdin:
        say(time_steps(step, device) if line.strip() == "steps" else profile_of(step, device))


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def training_step(model: Any, called: Any, device: str, batch: int, size: int) -> Callable[[], None]:
    """Forward, staged loss of soft targets, backward, AdamW."""
    optimizer, loss = build_optimizer(model, OptimizerSettings(), global_batch=4096), StagedCrossEntropy()
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.softmax(torch.randn(batch, 1000, device=device), dim=1)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            scores = StagedScores.of(called(images))
        loss(scores, targets).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(step: Callable[[], None], device: str) -> dict[str, Any]:
    """Steps one behind the other: the host may run ahead, as in training."""
    count = 1 if device == "cpu" else STEPS
    for _ in range(0 if device == "cpu" else 2):
        step()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    host = time.perf_counter() - started
    synchronize(device)
    taken = time.perf_counter() - started
    return {
        "milliseconds": round(1e3 * taken / count, 2),
        "host_milliseconds": round(1e3 * host / count, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device != "cpu" else None,
    }


def profile_of(step: Callable[[], None], device: str) -> dict[str, Any]:
    times = by_kernel([step], 1 if device == "cpu" else 5, device)
    return {
        "device_milliseconds": round(sum(times.values()), 2),
        "milliseconds": dict(list(times.items())[:KERNELS]),
    }


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))

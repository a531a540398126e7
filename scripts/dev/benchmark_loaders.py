"""The part of benchmark.py that times data loaders: ours and timm's own, on the same JPEGs, in turns."""

import argparse
import multiprocessing
import os
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
from sklearn.datasets import load_sample_images

from contextual_cnn.analysis.timm_transforms import PILLOW_13_PATCH, timm_arguments
from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.mixing import BatchAugmentation
from contextual_cnn.distributed import World
from contextual_cnn.randomness import Places
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings

GRAIN = 16  # standard deviation, in levels


def time_loaders(arguments: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Our loader and timm's on the same JPEGs: the whole recipe but mixing, and crop and flip alone."""
    recipes = {
        "full recipe": AugmentSettings(),
        "crop and flip": AugmentSettings(randaugment=None, color_jitter=0.0, erasing=0.0),
    }
    with tempfile.TemporaryDirectory() as folder:
        root = write_photos(Path(folder), images=512)
        for name, augment in recipes.items():
            yield name, _compare_loaders(root, augment, arguments)


def write_photos(root: Path, images: int) -> Path:
    """500 x 375 JPEGs of quality 92, parts of two photographs, with grain: as large as ImageNet's mean, 110 kB."""
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for i in range(images):
        path = root / "train" / f"class_{i % 4}" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        top, left = rng.integers(0, 427 - 375), rng.integers(0, 640 - 500)
        part = photos[i % 2][top : top + 375, left : left + 500] + rng.normal(0, GRAIN, (375, 500, 3))
        Image.fromarray(part.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return root


def _compare_loaders(root: Path, augment: AugmentSettings, arguments: argparse.Namespace) -> dict:
    """The loaders take turns; a turn starts with all queues full, uses its own up, and is timed in what follows."""
    stock, timed = 6, 8  # batches; no loader here is further ahead
    loaders = {
        "ours, DALI": _our_batches(root, augment, arguments, "dali"),
        "ours, torch": _our_batches(root, augment, arguments, "torch"),
        "timm": _timm_batches(root, augment, arguments),
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

    *ours, timms = rounds[0]
    return {
        "images_per_second": {name: median(lambda turn, n=name: turn[n][0], 1) for name in rounds[0]},
        "cpu_ms_per_image": {name: median(lambda turn, n=name: turn[n][1], 3) for name in rounds[0]},
        "speed_ratios": {f"{n} / {timms}": median(lambda turn, n=n: turn[n][0] / turn[timms][0], 3) for n in ours},
        "cpu_ratios": {f"{timms} / {n}": median(lambda turn, n=n: turn[timms][1] / turn[n][1], 3) for n in ours},
    }


def _our_batches(root: Path, augment: AugmentSettings, arguments: argparse.Namespace, loader: str) -> Iterator:
    data = ImageData(DataSettings(root=str(root), image_size=arguments.image_size, loader=loader), ("train",))
    plan = BatchPlan.make(
        images=len(data.sources["train"]),
        global_batch=arguments.batch_size,
        micro_batch=arguments.batch_size,
        world_size=1,
    )
    world = World(0, 1, 0, torch.device(arguments.device))
    erase = BatchAugmentation(replace(augment, mixup=0.0, cutmix=0.0, label_smoothing=0.0), data.num_classes)
    for step, batch in enumerate(data.train_batches(plan, augment, 0, world, 0)):
        yield erase(batch, Places(0, step, first=0, count=arguments.batch_size))


def _timm_batches(root: Path, augment: AugmentSettings, arguments: argparse.Namespace) -> Iterator:
    """timm's own loader with its defaults, a worker per core, over an epoch that does not end within the benchmark."""
    dataset = timm.data.ImageDataset(str(root / "train"))
    dataset.reader.samples = dataset.reader.samples * 1000
    with mock.patch.dict("timm.data.auto_augment.NAME_TO_OP", PILLOW_13_PATCH):
        loader = timm.data.create_loader(
            dataset,
            (3, arguments.image_size, arguments.image_size),
            arguments.batch_size,
            num_workers=len(os.sched_getaffinity(0)),
            device=torch.device(arguments.device),
            **timm_arguments(augment),
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

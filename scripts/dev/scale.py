"""What grows with images, classes and processes, measured on synthetic listings of ImageNet's size.

python scripts/dev/scale.py --output docs/results/cpu-scale.json    # some minutes, 3 GB below --folder
python scripts/dev/scale.py --images 20000                           # a look in seconds

Each figure is taken in a process of its own, and printed as a line of JSON when it is there. CPU-seconds are the
process's own; MiB are what its memory has grown by, of which `shared` lies in memory that all processes of a node map.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

IMAGENET = 1_281_167
PER_SHARD = 5_000
CLASSES = 1_000


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, Any] = {
        "date": datetime.now().date().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "torch": version("torch"),
        "images": arguments.images,
        "measured": {},
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.only:
            for case, found in MEASURES[name](Path(folder), arguments.images):
                key = f"{name}, {case}" if case else name
                results["measured"][key] = found
                print(json.dumps({key: found}), flush=True)
                if arguments.output is not None:
                    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--images", type=int, default=IMAGENET, help="of the training split (ImageNet's)")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="NAME", help="of: " + ", ".join(MEASURES)
    )
    parser.add_argument("--folder", type=Path, help="where the listings are made and removed")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    return parser.parse_args()


Found = Iterator[tuple[str, dict[str, float]]]


def listings(folder: Path, images: int) -> Found:
    """Opening a list file and tar shards, with and without an index."""
    root = make_list(folder / "list", images)
    yield "a list file", alone(open_source, root, "list")
    yield "8 processes of a node, a list file", node(root, "list", 8)
    root = make_shards(folder / "shards", images)
    yield "tar shards with an index", alone(open_source, root, "shards")
    yield "8 processes of a node, tar shards", node(root, "shards", 8)
    some = sorted((root / "train").glob("*.tar"))[:8]
    for file in [path for path in (root / "train").iterdir() if path.with_suffix(".tar") not in some]:
        file.unlink()
    for shard in some:
        shard.with_suffix(".idx").unlink()
        shard.with_suffix(".classes").unlink()
    yield f"{len(some)} shards without an index, which leave one", alone(open_source, root, "shards")
    yield f"{len(some)} shards at the next start", alone(open_source, root, "shards")


def sampler(_: Path, images: int) -> Found:
    """The permutation of an epoch, and a rank's micro-batches."""
    for epoch in (0, 299):
        yield f"start of epoch {epoch}", alone(first_batch, images, epoch)


def reports(_: Path, images: int) -> Found:
    """The report by class of 50,000 predictions."""
    for classes in (1_000, 21_841):
        yield f"{classes} classes", alone(report_by_class, classes)


def checkpoints(folder: Path, images: int) -> Found:
    """Of Contextual ConvNeXt-T: what the loop waits for, and what reading takes."""
    yield "a save, a best one, and one while it is written", alone(save_twice, folder / "checkpoints")
    yield "read and checked", alone(read_checkpoint, folder / "checkpoints/last.pt", "load_checkpoint")
    yield (
        "mapped, as the other processes of a node do",
        alone(read_checkpoint, folder / "checkpoints/last.pt", "map_checkpoint"),
    )
    yield (
        "weights alone, as evaluate.py reads them",
        alone(read_checkpoint, folder / "checkpoints/last.pt", "load_trained"),
    )


def short_epochs(folder: Path, _: int) -> Found:
    """The share of a run's time that goes by in saves, where an epoch takes two seconds."""
    yield "", alone(save_each_epoch, folder / "short", 30, 2.0)


MEASURES: dict[str, Callable[[Path, int], Found]] = {
    "listing": listings,
    "sampler": sampler,
    "report by class": reports,
    "checkpoint": checkpoints,
    "saves in epochs of 2 s": short_epochs,
}


def alone(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What a function finds in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, function, *arguments).result()


def measured(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    import contextual_cnn.data.image_data  # noqa: F401 - its memory is nobody's that is measured

    before, cpu, wall = memory(), time.process_time(), time.perf_counter()
    found = function(*arguments)
    after = memory()
    return {
        "cpu_s": round(time.process_time() - cpu, 3),
        "wall_s": round(time.perf_counter() - wall, 3),
        **{f"{kind}_mib": round(after[kind] - before[kind], 1) for kind in before},
        **found,
    }


def memory() -> dict[str, float]:
    """MiB of this process alone, and of what others may map as well."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, shared = (int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssShmem"))
    return {"own": own, "shared": shared}


def make_list(root: Path, images: int) -> Path:
    root.mkdir()
    for split, count in (("train", images), ("val", 1_000)):
        (root / split).mkdir()
        (root / split / "n00000000_0.JPEG").touch()
        lines = (f"{split}/n{i % CLASSES:08d}_{i}.JPEG {i % CLASSES}\n" for i in range(count))
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def make_shards(root: Path, images: int) -> Path:
    from contextual_cnn.data.sources.shard_index import write_shard

    for split, count in (("train", images), ("val", CLASSES)):
        (root / split).mkdir(parents=True)
        for first in range(0, count, PER_SHARD):
            numbers = range(first, min(first + PER_SHARD, count))
            samples = ((f"n{i % CLASSES:08d}_{i}.jpg", b"x", i % CLASSES) for i in numbers)
            write_shard(root / split / f"{first:08d}.tar", samples)
    return root


def open_source(root: Path, layout: str) -> dict[str, float]:
    from contextual_cnn.data.image_data import ImageData
    from contextual_cnn.settings.data import DataSettings

    global kept
    kept = ImageData(DataSettings(root=str(root), layout=layout))
    return {"images": len(kept.sources["train"])}


def node(root: Path, layout: str, processes: int) -> dict[str, float]:
    """The sum over the processes, of which the shared memory counts once."""
    context = get_context("spawn")
    meet = context.Barrier(processes)
    queue = context.SimpleQueue()
    started = [
        context.Process(target=rank_of_node, args=(rank, processes, root, layout, meet, queue))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    found = [queue.get() for _ in started]
    for process in started:
        process.join()
    return {
        "cpu_s": round(sum(rank["cpu_s"] for rank in found), 3),
        "own_mib": round(sum(rank["own_mib"] for rank in found), 1),
        "shared_mib": max(rank["shared_mib"] for rank in found),
    }


def rank_of_node(rank: int, processes: int, root: Path, layout: str, meet: Any, queue: Any) -> None:
    os.environ |= {"LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{processes}", "RANK": f"{rank}", "MASTER_PORT": "1"}
    found = measured(open_source, root, layout)
    touched = sum(int(array.sum()) for array in kept.sources["train"].arrays().values())  # or its pages do not count
    found["shared_mib"] = round(memory()["shared"], 1)
    meet.wait()
    queue.put(found | {"touched": touched})


def first_batch(images: int, epoch: int) -> dict[str, float]:
    from contextual_cnn.batch_plan import BatchPlan
    from contextual_cnn.data.sampler import TrainSampler

    global_batch = min(4096, images)
    plan = BatchPlan.make(images=images, global_batch=global_batch, micro_batch=min(128, global_batch), world_size=1)
    order = TrainSampler(plan, 0, 0, epoch * plan.steps_per_epoch)
    started = time.perf_counter()
    order[0]
    return {"first_s": round(time.perf_counter() - started, 4)}


def report_by_class(classes: int) -> dict[str, float]:
    from contextual_cnn.tasks.image_classification.class_report import report_classes

    draw = np.random.default_rng(0)
    targets, predicted = draw.integers(0, classes, (2, 50_000))
    cpu = time.process_time()
    report_classes(targets, predicted, classes)
    return {"report_cpu_s": round(time.process_time() - cpu, 4)}


def state_of_t() -> dict[str, Any]:
    """As large as that of the real run: weights, average, two moments."""
    from contextual_cnn.models import build_model
    from contextual_cnn.settings.model import ModelSettings

    weights = build_model(ModelSettings(name="contextual_convnext_tiny", num_classes=CLASSES)).state_dict()
    moments = {
        i: {"exp_avg": tensor.clone(), "exp_avg_sq": tensor.clone()} for i, tensor in enumerate(weights.values())
    }
    average = {name: tensor.clone() for name, tensor in weights.items()}
    return {"step": 1, "model": weights, "ema": average, "optimizer": {"state": moments}}


def save_twice(folder: Path) -> dict[str, float]:
    from contextual_cnn.runs.checkpoint_store import CheckpointStore
    from contextual_cnn.settings.checkpoint import CheckpointSettings

    folder.mkdir(parents=True)
    store, state, waited = CheckpointStore(folder, CheckpointSettings()), state_of_t(), {}
    for name, is_best in (("first_s", False), ("best_while_it_is_written_s", True)):
        started = time.perf_counter()
        store.save(state | {"step": len(waited)}, is_best=is_best)
        waited[name] = round(time.perf_counter() - started, 3)
    started = time.perf_counter()
    store.close()
    written = (folder / "last.pt").stat().st_size / 2**20
    return waited | {"written_after_s": round(time.perf_counter() - started, 2), "file_mib": round(written, 1)}


def read_checkpoint(path: Path, function: str) -> dict[str, float]:
    from contextual_cnn.runs import checkpoint

    cpu, before = time.process_time(), memory()["own"]
    state = getattr(checkpoint, function)(path)
    touched = sum(tensor.sum().item() for tensor in state["model"].values())
    return {
        "read_cpu_s": round(time.process_time() - cpu, 2),
        "read_own_mib": round(memory()["own"] - before, 1),
        "finite": float(np.isfinite(touched)),
    }


def save_each_epoch(folder: Path, epochs: int, seconds: float) -> dict[str, float]:
    """As the trainer asks at the end of an epoch; the best state comes up in the first third of the epochs."""
    from contextual_cnn.runs.checkpoint_store import CheckpointStore
    from contextual_cnn.settings.checkpoint import CheckpointSettings

    folder.mkdir()
    store, state = CheckpointStore(folder, CheckpointSettings()), state_of_t()
    in_saves, saves, started = 0.0, 0, time.perf_counter()
    for epoch in range(epochs):
        time.sleep(seconds)
        is_best = epoch < epochs // 3 and epoch % 3 == 0
        if is_best or store.can_afford():
            before = time.perf_counter()
            store.save(state | {"step": epoch}, is_best=is_best)
            in_saves, saves = in_saves + time.perf_counter() - before, saves + 1
    whole = time.perf_counter() - started
    store.close()
    return {"epochs": epochs, "saves": saves, "share_in_saves": round(in_saves / whole, 4)}


if __name__ == "__main__":
    main()

"""DALI's graphs for a GPU beside the same graphs for a CPU: python scripts/dev/check_dali.py [--output FILE]

A line of JSON for each check: mean difference in levels of 255, and that of the worst image. Draws are the same on
both, so what differs is the decoder and the resize: about 0.2 levels; RandAugment multiplies that, up to about 1. A
check fails where targets differ, or pictures by more than the same crop of the same image can. Micro-batches of 1 and
2 leave branches of the graph without an image. --device cpu compares the CPU's graph with the torch loader.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.contracts import Batch
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.device import choose_device, memory_in_use
from contextual_cnn.distributed import World
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings

CROPS = AugmentSettings(randaugment=None, color_jitter=0.0)
JITTER = AugmentSettings(randaugment=None)
LARGEST_MEAN = 2.0  # levels; another crop or image differs by more than five
LEVELS = 255 * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": dict(format="JPEG", subsampling=0),
    "4:2:2": dict(format="JPEG", subsampling=1),
    "progressive": dict(format="JPEG", progressive=True),
    "grey": dict(format="JPEG", mode="L"),
    "CMYK": dict(format="JPEG", mode="CMYK"),
    "PNG": dict(format="PNG"),
    "PNG with alpha": dict(format="PNG", mode="RGBA"),
    "PNG with a palette": dict(format="PNG", mode="P"),
    "WebP": dict(format="WEBP"),
    "BMP": dict(format="BMP"),
    "TIFF": dict(format="TIFF"),
}
Pictures = list[tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    arguments = parse_arguments()
    device = choose_device(arguments.device, 0)
    with tempfile.TemporaryDirectory() as folder:
        root = write_images(Path(folder) / "jpegs", 32)
        checks: dict[str, Callable[[], dict[str, Any]]] = {
            "crop and flip": partial(training, root, CROPS, 8, 4, device),
            "RandAugment": partial(training, root, AugmentSettings(), 8, 4, device),
            "RandAugment, bicubic": partial(training, root, AugmentSettings(interpolation="bicubic"), 8, 4, device),
            "micro-batches of 2": partial(training, root, AugmentSettings(), 2, 16, device),
            "micro-batches of 1": partial(training, root, AugmentSettings(), 1, 16, device),
            "color jitter": partial(training, root, JITTER, 8, 4, device),
            "evaluation, twice": partial(evaluation, root, device),
            "damaged images": partial(damaged, Path(folder) / "damaged", device),
            "images per second": partial(speed, root, device),
        }
        for kind, options in KINDS.items():
            checks[f"kind {kind}"] = partial(kind_of_image, Path(folder) / kind.replace(":", ""), options, device)
        failed = [name for name, check in checks.items() if not run(name, check, arguments.output)]
    raise SystemExit(len(failed) > 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE", help="gets the lines too")
    return parser.parse_args()


def run(name: str, check: Callable[[], dict[str, Any]], output: Path | None) -> bool:
    """Prints what a check found, or why it failed; whether it passed."""
    started, found = time.perf_counter(), {}
    try:
        found = check()
    except Exception as error:  # a failed check must not cost the others
        found = {"failed": f"{type(error).__name__}: {error!s:.500}"}
    line = json.dumps({"check": name, **found, "seconds": round(time.perf_counter() - started, 1)})
    print(line, flush=True)
    if output is not None:
        with output.open("a") as file:
            file.write(line + "\n")
    return "failed" not in found


def training(root: Path, augment: AugmentSettings, micro_batch: int, count: int, device: torch.device) -> dict:
    read = partial(train_batches, augment=augment, micro_batch=micro_batch, count=count)
    return compare(read(data_of(root), device), read(reference_of(root, device), torch.device("cpu")))


def data_of(root: Path, loader: Literal["dali", "torch"] = "dali") -> ImageData:
    return ImageData(DataSettings(root=str(root), threads=2, eval_batch_size=5, loader=loader))


def reference_of(root: Path, device: torch.device) -> ImageData:
    """What is taken for right on the CPU: DALI's other graph, and for that graph itself the torch loader."""
    return data_of(root, "torch" if device.type == "cpu" else "dali")


def train_batches(
    data: ImageData, device: torch.device, *, augment: AugmentSettings, micro_batch: int, count: int
) -> Pictures:
    images = len(data.sources["train"])
    plan = BatchPlan.make(images=images, global_batch=micro_batch, micro_batch=micro_batch, world_size=1)
    batches = data.train_batches(plan, augment, 0, World(0, 1, 0, device), 0)
    return [on_host(next(batches), device) for _ in range(count)]


def on_host(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies, of a batch that is on its device in the memory format that the models take."""
    assert batch.images.device.type == batch.targets.device.type == device.type
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    return batch.images.cpu().clone(), batch.targets.cpu().clone()


def compare(ours: Pictures, reference: Pictures) -> dict[str, Any]:
    assert all(torch.equal(targets, same) for (_, targets), (_, same) in zip(ours, reference, strict=True)), (
        "targets differ"
    )
    images, expected = (torch.cat([pictures for pictures, _ in batches]) for batches in (ours, reference))
    levels = ((images - expected) * LEVELS).abs()
    mean, worst = levels.mean().item(), levels.mean((1, 2, 3)).max().item()
    assert mean < LARGEST_MEAN, f"pictures differ by {mean:.2f} levels on average, the worst by {worst:.2f}"
    return {"mean": round(mean, 4), "worst": round(worst, 3)}


def evaluation(root: Path, device: torch.device) -> dict[str, Any]:
    """Two passes, which must be the same."""
    host = torch.device("cpu")
    batches = data_of(root).evaluation_batches(World(0, 1, 0, device))
    first, second = ([on_host(batch, device) for batch in batches] for _ in range(2))
    expected = [on_host(batch, host) for batch in reference_of(root, device).evaluation_batches(World(0, 1, 0, host))]
    return compare(first, expected) | {"between_two_passes": compare(first, second)["mean"]}


def damaged(root: Path, device: torch.device) -> dict[str, Any]:
    """A JPEG whose header breaks off: another image stands in, the same on both."""
    write_images(root, 12)
    for split in ("train", "val"):
        broken = sorted((root / split).rglob("*.JPEG"))[3]
        broken.write_bytes(broken.read_bytes()[:200] + b"\xff\xd9")
    found = training(root, CROPS, 4, 3, device)
    return found | {"evaluation": evaluation(root, device)["mean"]}


def kind_of_image(root: Path, options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return training(write_images(root, 4, **options), CROPS, 4, 1, device)


def speed(root: Path, device: torch.device) -> dict[str, Any]:
    """Of the recipe at 32 images a batch, by threads; and what DALI holds of the card beside torch."""
    found: dict[str, Any] = {}
    for threads in (2, 4, 8):
        data = ImageData(DataSettings(root=str(root), threads=threads))
        plan = BatchPlan.make(images=32, global_batch=32, micro_batch=32, world_size=1)
        batches = data.train_batches(plan, AugmentSettings(), 0, World(0, 1, 0, device), 0)
        for _ in range(4):
            next(batches)
        started = time.perf_counter()
        for _ in range(8):
            next(batches).images[0, 0, 0, 0].item()
        found[f"{threads}_threads"] = round(8 * 32 / (time.perf_counter() - started))
    if device.type == "cuda":
        found["beside_torch_gib"] = round((memory_in_use(device) - torch.cuda.memory_reserved(device)) / 2**30, 2)
    return found


def write_images(
    root: Path, count: int, *, classes: int = 2, format: str = "JPEG", mode: str = "RGB", **options: Any
) -> Path:
    """Noisy waves of many sizes, in both splits."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(count):
            height, width = draw.integers(60, 500, 2)
            y, x = np.mgrid[:height, :width] / 40
            waves = 127 + 80 * np.sin(x[..., None] + draw.uniform(0, 6, 3)) * np.cos(
                y[..., None] + draw.uniform(0, 6, 3)
            )
            pixels = (waves + draw.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8)
            file = root / split / f"class_{i % classes}" / f"{i:03d}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return root


if __name__ == "__main__":
    main()

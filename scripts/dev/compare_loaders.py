"""Compares what our loader and timm's own transform make of the same images, by statistics of each training sample.

python scripts/dev/compare_loaders.py [--images 2400] [--root ROOT] [--interpolation bilinear|bicubic] [--output FILE]

Nine numbers of each sample (mean and standard deviation of each channel, gradient, dark and bright share), and for each
the Kolmogorov-Smirnov distance of its two distributions beside the 95 % line. Whole recipe but mixing, which is timm's
own code in both. Without ROOT, the images are parts of photographs that scikit-learn and matplotlib bring along.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib.cbook
import numpy as np
import torch
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images

from contextual_cnn.analysis.timm_transforms import timm_transform
from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.contracts import Batch
from contextual_cnn.data.image_check import decode_rgb
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.mixing import BatchAugmentation
from contextual_cnn.data.process_pool import progress_bar
from contextual_cnn.distributed import World
from contextual_cnn.errors import run_script
from contextual_cnn.randomness import Places, Purpose, seed_all
from contextual_cnn.runs.environment import environment, print_report
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 48
STATISTICS = [f"{what} {c}" for what in ("mean", "deviation") for c in "RGB"] + ["gradient", "dark", "bright"]
LINE = 1.358  # of the distance times sqrt(n m / (n + m)): 5 % of equal distributions are above


def main() -> None:
    arguments = parse_arguments()
    augment = AugmentSettings(interpolation=arguments.interpolation, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.root or write_parts(Path(folder), arguments.images)
        settings = DataSettings(
            root=str(root), image_size=arguments.image_size, loader=arguments.loader, mean=MEAN, std=STD
        )
        data = ImageData(settings, ("train",))
        images = data.sources["train"]
        count = min(arguments.images, len(images)) // BATCH * BATCH
        data.sources["train"] = images.take(np.random.default_rng(0).choice(len(images), count, replace=False))
        ours = our_statistics(data, augment, arguments.seed)
        theirs = timm_statistics(data, augment, arguments)
    results = {name: distances(ours[:, i], theirs[:, i]) for i, name in enumerate(STATISTICS)}
    report = {
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "environment": environment(),
        "images": count,
        "line": LINE,
        "below_the_line": sum(found["ks"] < LINE for found in results.values()),
        "results": results,
    }
    print_report(report, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with train/, or train.txt")
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--interpolation", choices=["bilinear", "bicubic"], default="bilinear", help="of our RandAugment"
    )
    parser.add_argument("--loader", choices=["dali", "torch"], default="dali")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.images < BATCH:
        parser.error(f"--images must be {BATCH} or more, got {arguments.images}")
    return arguments


def write_parts(root: Path, images: int) -> Path:
    """JPEGs of 200 to 400 pixels a side, parts of three photographs."""
    hopper = matplotlib.cbook.get_sample_data("grace_hopper.jpg")
    photos = [*load_sample_images().images, np.asarray(decode_rgb(hopper.read(), "grace_hopper.jpg"))]
    rng = np.random.default_rng(0)
    for i in range(images):
        path = root / "train" / f"class_{i % 4}" / f"{i:04d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo, (height, width) = photos[i % 3], rng.integers(200, 401, 2)
        top, left = rng.integers(0, photo.shape[0] - height + 1), rng.integers(0, photo.shape[1] - width + 1)
        Image.fromarray(photo[top : top + height, left : left + width]).save(path, quality=92)
    return root


def our_statistics(data: ImageData, augment: AugmentSettings, seed: int) -> np.ndarray:
    """(N, 9), one epoch."""
    count = len(data.sources["train"])
    plan = BatchPlan.make(images=count, global_batch=BATCH, micro_batch=BATCH, world_size=1)
    batches = data.train_batches(plan, augment, seed, World(0, 1, 0, torch.device("cpu")), 0)
    erase = BatchAugmentation(augment, data.num_classes)
    found = []
    with progress_bar() as bar:
        for n in bar.track(range(plan.steps_per_epoch), description="ours"):
            batch = erase(Batch(*next(batches)), Places(seed, step=n, first=0, count=BATCH))
            found.append(statistics(batch.images))
    return np.concatenate(found)


def timm_statistics(data: ImageData, augment: AugmentSettings, arguments: argparse.Namespace) -> np.ndarray:
    """(N, 9), each image once."""
    images, found = data.sources["train"], []
    transform = timm_transform(augment, arguments.image_size, MEAN, STD)
    seed_all(Purpose.MICRO_BATCH, arguments.seed)
    with progress_bar() as bar:
        for index in bar.track(range(len(images)), description="timm's"):
            image = decode_rgb(images.read(index), images.name(index))
            found.append(statistics(transform(image)[None]))
    return np.concatenate(found)


def statistics(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) normalised -> (B, 9), as STATISTICS names them, in levels of 0 to 255 or shares."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    levels = (images * std + mean) * 255
    luma = (levels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1)
    gradient = luma.diff(dim=1).abs().mean(dim=(1, 2)) + luma.diff(dim=2).abs().mean(dim=(1, 2))
    shares = [(luma < 32).float().mean(dim=(1, 2)), (luma > 224).float().mean(dim=(1, 2))]
    columns = [*levels.mean(dim=(2, 3)).unbind(1), *levels.std(dim=(2, 3)).unbind(1), gradient, *shares]
    return torch.stack(columns, dim=1).numpy()


def distances(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Means, and the distance scaled by the sizes, so that it is compared with LINE."""
    distance = ks_2samp(ours, theirs).statistic
    scaled = distance * np.sqrt(len(ours) * len(theirs) / (len(ours) + len(theirs)))
    return {"ours": round(float(ours.mean()), 4), "timm": round(float(theirs.mean()), 4), "ks": round(float(scaled), 3)}


if __name__ == "__main__":
    run_script(main)

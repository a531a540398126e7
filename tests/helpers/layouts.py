"""The images of a folder of classes, written in the other layouts."""

import shutil
from pathlib import Path

import numpy as np

from contextual_cnn.data.sources import open_source
from contextual_cnn.data.sources.shard_index import write_shard

LAYOUTS = ("folders", "list", "shards")


def write_layout(layout: str, image_root: Path, root: Path, shard_images: int = 7) -> Path:
    """Copies the class folders `image_root` to `root` in another layout; shards are shuffled."""
    if layout == "folders":
        return Path(shutil.copytree(image_root, root))
    root.mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        source = open_source(image_root, split, "folders")
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in source.classes))
        samples = [(flat_name(source.name(i)), source.read(i), int(source.targets[i])) for i in range(len(source))]
        if layout == "list":
            for name, image, _ in samples:
                (root / split / name).write_bytes(image)
            (root / f"{split}.txt").write_text("".join(f"{split}/{name} {target}\n" for name, _, target in samples))
        else:
            order = np.random.default_rng(0).permutation(len(samples))
            for start in range(0, len(order), shard_images):
                shard = root / split / f"{split}-{start // shard_images:03d}.tar"
                write_shard(shard, [samples[i] for i in order[start : start + shard_images]])
    return root


def flat_name(name: str) -> str:
    """train/class_0/1.JPEG -> class_0_1.JPEG"""
    return "_".join(Path(name).parts[1:])

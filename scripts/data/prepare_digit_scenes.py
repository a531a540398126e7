"""Writes scenes of digits on photographs, with boxes and masks in COCO's format.

python scripts/data/prepare_digit_scenes.py FOLDER [--train 400] [--val 100]

The digits are scikit-learn's scans, the backgrounds patches of its two photographs; digits and patches of the val split
are others than those of the train split. A digit may cover a part of another; one in ten scenes has none.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits, load_sample_images

SIZE, SMALLEST, LARGEST, MOST = 128, 20, 52, 5
EMPTY = 0.1  # share of the scenes without a digit
INK = 96  # of 255, from which on a pixel is the digit's
BRIGHT = 160  # of 255, a digit's colors at least; the photographs are dimmed to half
VISIBLE = 0.4  # share of a digit that others must leave


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=400, help="scenes")
    parser.add_argument("--val", type=int, default=100, help="scenes")
    arguments = parser.parse_args()
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    fifth = len(order) // 5
    photographs = load_sample_images().images
    edge = int(0.7 * photographs[0].shape[1])
    for split, scenes, digits, parts in (
        ("train", arguments.train, order[fifth:], [photograph[:, :edge] for photograph in photographs]),
        ("val", arguments.val, order[:fifth], [photograph[:, edge:] for photograph in photographs]),
    ):
        if scenes < 1:
            parser.error(f"--{split} must be 1 or more, got {scenes}")
        draws = np.random.default_rng(split == "val")
        pairs = [(data.images[i], int(data.target[i])) for i in digits]
        made = [scene(pairs, parts, draws) for _ in range(scenes)]
        write(arguments.folder, split, made)
        objects = sum(len(labels) for _, _, labels in made)
        print(f"{arguments.folder / split}: {scenes} scenes of {SIZE} x {SIZE} pixels, {objects} digits")


def scene(
    digits: list[tuple[np.ndarray, int]], photographs: list[np.ndarray], draws: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Pixels (H, W, 3) uint8, masks (H, W) bool of what is seen of each digit, and which digits they are."""
    photograph = photographs[draws.integers(len(photographs))]
    top, left = draws.integers(0, np.array(photograph.shape[:2]) - SIZE + 1)
    pixels = photograph[top : top + SIZE, left : left + SIZE] // 2
    masks: list[np.ndarray] = []
    labels: list[int] = []
    for _ in range(0 if draws.random() < EMPTY else draws.integers(1, MOST + 1)):
        scan, label = digits[draws.integers(len(digits))]
        side = int(draws.integers(SMALLEST, LARGEST + 1))
        top, left = draws.integers(0, SIZE - side + 1, 2)
        sprite = Image.fromarray((scan * (255 / 16)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[top : top + side, left : left + side] = np.asarray(sprite) >= INK
        if any((other & ~mask).sum() < VISIBLE * other.sum() for other in masks):
            continue
        masks = [*(other & ~mask for other in masks), mask]
        labels.append(label)
        pixels[mask] = draws.integers(BRIGHT, 256, 3)
    return pixels, masks, labels


def write(folder: Path, split: str, scenes: list[tuple[np.ndarray, list[np.ndarray], list[int]]]) -> None:
    images, annotations = [], []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number, (pixels, masks, labels) in enumerate(scenes, start=1):
        name = f"{number:06d}.png"
        Image.fromarray(pixels).save(folder / split / name)
        images.append({"id": number, "file_name": name, "height": SIZE, "width": SIZE})
        for mask, label in zip(masks, labels, strict=True):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation(mask, label)})
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    file = folder / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def annotation(mask: np.ndarray, label: int) -> dict[str, Any]:
    """The box and the area of what is seen, and the mask as run lengths."""
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": label + 1,
        "bbox": coco_mask.toBbox(packed).tolist(),
        "area": int(coco_mask.area(packed)),
        "iscrowd": 0,
        "segmentation": {"size": packed["size"], "counts": packed["counts"].decode("ascii")},
    }


if __name__ == "__main__":
    main()

"""Data sets in COCO's files, made by hand."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def rectangle(number: int, image: int, category: int, box: tuple[int, int, int, int], **others) -> dict:
    """An annotation whose mask fills its box: left, top, width, height."""
    left, top, width, height = box
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [corners],
        **others,
    }


CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}, {"id": 90, "name": "brush"}]

# Of 80 x 60 pixels; ids with gaps, two objects, one, a crowd beside an object, and nothing
IMAGES = [{"id": 7 * n + 11, "file_name": f"picture {n}.png", "height": 60, "width": 80} for n in range(4)]
ANNOTATIONS = [
    rectangle(101, 11, 17, (8, 10, 30, 20)),
    rectangle(205, 11, 3, (40, 30, 24, 24)),
    rectangle(33, 18, 90, (20, 5, 40, 50)),
    rectangle(34, 25, 3, (0, 0, 20, 60)),
    rectangle(
        35, 25, 3, (30, 0, 50, 60), iscrowd=1, segmentation={"size": [60, 80], "counts": [1800, 3000]}, area=3000
    ),
]


def write_split(root: Path, split: str, annotations=ANNOTATIONS, images=IMAGES, categories=CATEGORIES) -> None:
    """Noise with bright rectangles where something is annotated."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    draws = np.random.default_rng(0)
    for image in images:
        pixels = draws.integers(0, 80, (image["height"], image["width"], 3)).astype(np.uint8)
        for entry in annotations:
            if isinstance(entry, dict) and entry.get("image_id") == image["id"]:
                left, top, width, height = entry["bbox"]
                pixels[top : top + height, left : left + width] = 200
        Image.fromarray(pixels).save(root / split / image["file_name"])
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def write_scenes(root: Path) -> Path:
    """Both splits."""
    write_split(root, "train")
    write_split(root, "val")
    return root

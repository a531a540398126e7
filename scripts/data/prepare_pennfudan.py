"""Writes the annotations of Penn-Fudan's pedestrians in COCO's format: 170 photographs, a mask for each person.

python scripts/data/prepare_pennfudan.py PennFudanPed FOLDER [--val 50]

PennFudanPed is the data set as it comes (www.cis.upenn.edu/~jshi/ped_html): PNGImages/ and PedMasks/. The images are
copied. The val split is spread evenly over them.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from contextual_cnn.data.image_check import open_image, reason_of
from contextual_cnn.errors import UserError, run_script

CATEGORIES = [{"id": 1, "name": "person"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pennfudan", type=Path, metavar="PennFudanPed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--val", type=int, default=50, help="images of the val split")
    arguments = parser.parse_args()
    pictures = sorted((arguments.pennfudan / "PNGImages").glob("*.png"))
    if not pictures:
        raise UserError(f"{arguments.pennfudan} has no PNGImages/*.png", "give the folder PennFudanPed as it comes")
    if not 0 < arguments.val < len(pictures):
        parser.error(f"--val must be from 1 to {len(pictures) - 1}, got {arguments.val}")
    val = {pictures[i] for i in np.linspace(0, len(pictures), arguments.val, endpoint=False, dtype=int)}
    for split, chosen in (("train", [p for p in pictures if p not in val]), ("val", sorted(val))):
        people = write(arguments.pennfudan, arguments.folder, split, chosen)
        print(f"{arguments.folder / split}: {len(chosen)} photographs, {people} people")


def write(source: Path, folder: Path, split: str, pictures: list[Path]) -> int:
    """Returns the number of people."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures, start=1):
        people = read(source / "PedMasks" / f"{picture.stem}_mask.png")
        shutil.copyfile(picture, folder / split / picture.name)
        height, width = people.shape
        images.append({"id": number, "file_name": picture.name, "height": height, "width": width})
        for person in np.unique(people[people > 0]):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation(people == person)})
    file = folder / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return len(annotations)


def read(path: Path) -> np.ndarray:
    """(H, W) uint8: 0, or the number of a person."""
    try:
        with open_image(path.read_bytes(), ("PNG",)) as image:
            return np.array(image)
    except Exception as error:  # a decoder raises anything from OSError to struct.error
        raise UserError(f"{path} cannot be read: {reason_of(error)}", "restore the file") from error


def annotation(mask: np.ndarray) -> dict[str, Any]:
    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": 1,
        "bbox": coco_mask.toBbox(packed).tolist(),
        "area": int(coco_mask.area(packed)),
        "iscrowd": 0,
        "segmentation": {"size": packed["size"], "counts": packed["counts"].decode("ascii")},
    }


if __name__ == "__main__":
    run_script(main)

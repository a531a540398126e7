"""A split of a data set in COCO's files: images, and the objects that are annotated in them.

    ROOT/annotations/instances_train2017.json and ROOT/train2017/, or without the year, and the same of val

Everything lies in arrays, which the processes of a machine share: COCO's training split has 860,000 objects.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from contextual_cnn.data.detection.masks import run_lengths
from contextual_cnn.data.sources.names import Indices, Names
from contextual_cnn.data.sources.source import ImageSource
from contextual_cnn.errors import UserError
from contextual_cnn.text import printable

_YEARS = ("2017", "")
_LARGEST_SIDE = 2**15
_SMALLEST = 1.0  # pixels: what is annotated with a thinner box is not trained on (mmdetection)


@dataclass(frozen=True)
class Objects:
    """What is annotated in one image, n objects.

    boxes: (n, 4) float64, left, top, width, height in pixels, as they are annotated. labels: (n,) int64, positions in
    the source's classes. crowd: (n,) bool, groups of objects that nobody counted. areas: (n,) float64, of the masks.
    ids: (n,) int64. segmentations: as they are annotated.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    segmentations: list[Any]


class CocoImages(ImageSource):
    """The images of one split, by their ids, and their objects.

    Attributes:
        targets: (N,) int64, the images' ids.
        classes: the names of the categories, in the order of their ids.
        category_ids: (classes,) int64, which may have gaps.
    """

    def __init__(
        self, folder: Path, classes: tuple[str, ...], category_ids: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> None:
        self.folder, self.classes, self.category_ids = folder, classes, category_ids
        self._arrays = arrays
        self.targets = arrays["image_ids"]
        self._names = Names(arrays["names"], arrays["name_ends"])
        self._faults = Names(arrays["faults"], arrays["fault_ends"])
        self._segmentations = Names(arrays["segmentations"], arrays["segmentation_ends"])

    def name(self, index: int) -> str:
        return printable(f"{self.folder.name}/{self._names[index]}")

    def read(self, index: int) -> bytes:
        with open(f"{self.folder}/{self._names[index]}", "rb", buffering=0) as file:
            return file.readall()

    def size(self, index: int) -> tuple[int, int]:
        """Height and width, as they are annotated."""
        height, width = self._arrays["sizes"][index].tolist()
        return height, width

    def fault(self, index: int) -> str:
        """What is wrong with an image's annotations; empty if nothing is."""
        return self._faults[index]

    def objects(self, index: int) -> Objects:
        """All that are annotated, but those that are malformed."""
        begin, end = self._span(index)
        columns = {name: self._arrays[name][begin:end] for name in ("boxes", "labels", "crowd", "areas", "ids")}
        return Objects(**columns, segmentations=[json.loads(self._segmentations[i]) for i in range(begin, end)])

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) objects of each image, and how many of them can be trained on."""
        starts = np.r_[0, self._arrays["object_ends"]]
        usable = np.r_[0, np.cumsum(is_usable(self._arrays["boxes"], self._arrays["crowd"], self._arrays["areas"]))]
        return np.diff(starts), np.diff(usable[starts])

    def is_upright(self) -> np.ndarray:
        """(N,) bool, higher than wide."""
        sizes = self._arrays["sizes"]
        return sizes[:, 0] > sizes[:, 1]

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(self._arrays)

    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> "CocoImages":
        return CocoImages(self.folder, self.classes, self.category_ids, arrays)

    def take(self, indices: Indices) -> "CocoImages":
        chosen = np.asarray(indices, dtype=np.int64)
        spans = [self._span(int(index)) for index in chosen]
        of_objects = np.concatenate([np.arange(begin, end) for begin, end in spans] or [np.zeros(0, np.int64)])
        old = self._arrays
        arrays = {name: old[name][of_objects] for name in ("boxes", "labels", "crowd", "areas", "ids")}
        arrays |= {name: old[name][chosen] for name in ("image_ids", "sizes")}
        arrays["object_ends"] = np.cumsum([end - begin for begin, end in spans], dtype=np.int64)
        arrays |= _texts("names", "name_ends", (self._names[int(i)] for i in chosen))
        arrays |= _texts("faults", "fault_ends", (self._faults[int(i)] for i in chosen))
        arrays |= _texts("segmentations", "segmentation_ends", (self._segmentations[int(i)] for i in of_objects))
        return self.with_arrays(arrays)

    def _span(self, index: int) -> tuple[int, int]:
        ends = self._arrays["object_ends"]
        return int(ends[index - 1]) if index else 0, int(ends[index])


def is_usable(boxes: np.ndarray, crowd: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """(n,) bool: objects to train on, no crowds and nothing thinner than a pixel."""
    return ~crowd & (areas > 0) & (boxes[:, 2:] >= _SMALLEST).all(axis=1)


def open_coco(root: Path, split: str, classes: tuple[str, ...] | None = None) -> CocoImages:
    """Reads the annotations of one split.

    A malformed annotation is a fault of its image (`CocoImages.fault`); a malformed file, or list of images or
    categories, is an error.

    Args:
        classes: what the categories must be called, in the order of their ids; None takes any.

    Raises:
        UserError: naming the file, and the entry.
    """
    file, folder = _find(root, split)
    content = _read(file)
    category_ids, names = _categories(content["categories"], file)
    if classes is not None and names != classes:
        different = next((pair for pair in zip(names, classes, strict=False) if pair[0] != pair[1]), None)
        raise UserError(
            f"{file} has {len(names)} categories, the model {len(classes)}"
            + (f"; the first other one is {different[0]!r} instead of {different[1]!r}" if different else ""),
            "data.root=ROOT of a data set with the same categories",
        )
    images = _images(content["images"], file)
    by_image, faults = _annotations(content["annotations"], images, category_ids)
    arrays = _as_arrays(images, by_image, faults)
    return CocoImages(folder, names, np.array(category_ids, dtype=np.int64), arrays)


def _find(root: Path, split: str) -> tuple[Path, Path]:
    for year in _YEARS:
        file, folder = root / "annotations" / f"instances_{split}{year}.json", root / f"{split}{year}"
        if file.is_file():
            if not folder.is_dir():
                raise UserError(f"data.root: {file} is there, but no folder {folder} with its images", "data.root=ROOT")
            return file, folder
    raise UserError(
        f"data.root: there is no {root / 'annotations' / f'instances_{split}2017.json'}",
        "ROOT/annotations/instances_train2017.json and ROOT/train2017/, or both without the year",
    )


def _read(file: Path) -> Mapping[str, list]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error!s:.200}", "restore the file") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{file} has no list {key!r}", "it is to be COCO's format: images, annotations, categories")
    return content


def _categories(entries: list, file: Path) -> tuple[list[int], tuple[str, ...]]:
    named: dict[int, str] = {}
    for entry in entries:
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or not isinstance(name, str) or number in named or name in named.values():
            raise UserError(f"{file}: the category {entry!r:.100} has no id or name of its own", "correct the entry")
        named[number] = printable(name)
    if not named:
        raise UserError(f"{file} has no categories", "give at least one, with id and name")
    return sorted(named), tuple(named[number] for number in sorted(named))


def _images(entries: list, file: Path) -> dict[int, tuple[str, int, int]]:
    """By id: file name, height, width."""
    images: dict[int, tuple[str, int, int]] = {}
    for entry in entries:
        found: dict[str, Any] = entry if isinstance(entry, dict) else {}
        number, name, height, width = (found.get(key) for key in ("id", "file_name", "height", "width"))
        if type(number) is not int or number in images or not (_is_inside(name) and _is_side(height, width)):
            raise UserError(
                f"{file}: the image {entry!r:.200} has no id of its own, no height and width, or no file_name below "
                "its folder",
                "correct the entry",
            )
        images[number] = (cast(str, name), cast(int, height), cast(int, width))
    if not images:
        raise UserError(f"{file} lists no images", "give at least one")
    return images


def _is_side(*sides: Any) -> bool:
    return all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in sides)


def _is_inside(name: Any) -> bool:
    return (
        isinstance(name, str) and bool(name) and name.isprintable() and not name.startswith("/")
        and ".." not in name.split("/")
    )  # fmt: skip


def _annotations(
    entries: list, images: Mapping[int, tuple[str, int, int]], category_ids: Sequence[int]
) -> tuple[dict[int, list[dict]], dict[int, str]]:
    """By image id: the well-formed annotations, with their label; and what is wrong with another."""
    by_image: dict[int, list[dict]] = {}
    faults: dict[int, str] = {}
    labels, seen = {number: label for label, number in enumerate(category_ids)}, set[int]()
    for entry in entries:
        found = entry if isinstance(entry, dict) else {}
        image = found.get("image_id")
        if type(image) is not int or image not in images:
            continue  # of an image that is not there, as in a part of COCO
        _, height, width = images[image]
        problem = _problem(found, labels, height, width)
        if not problem and found["id"] in seen:
            problem = "its id is another one's too"
        if problem:
            faults.setdefault(image, printable(f"annotation {found.get('id')!r:.40}: {problem}"))
            continue
        seen.add(found["id"])
        by_image.setdefault(image, []).append(found | {"label": labels[found["category_id"]]})
    return by_image, faults


def _problem(entry: Mapping[str, Any], labels: Mapping[int, int], height: int, width: int) -> str:
    """Why an annotation cannot be used; empty if it can. Masks are looked at closely when they are made."""
    box, segmentation = entry.get("bbox"), entry.get("segmentation")
    if type(entry.get("id")) is not int:
        return "its id is not a number"
    if type(entry.get("category_id")) is not int or entry["category_id"] not in labels:
        return f"no category has the id {entry.get('category_id')!r:.40}"
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        return f"its bbox {box!r:.80} is not four numbers"
    if min(box[2:]) < 0 or min(box[:2]) < -width - height or max(box) > 2 * (width + height):
        return f"its bbox {box!r:.80} is far from the image of {width} x {height} pixels"
    if not _is_number(entry.get("area", 0)):
        return "its area is not a number"
    if entry.get("iscrowd", 0) not in (0, 1):
        return "its iscrowd is neither 0 nor 1"
    if not isinstance(segmentation, list | dict) or not segmentation:
        return "it has no segmentation"
    return ""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _as_arrays(
    images: Mapping[int, tuple[str, int, int]], by_image: Mapping[int, list[dict]], faults: Mapping[int, str]
) -> dict[str, np.ndarray]:
    objects = [entry for number in images for entry in by_image.get(number, ())]
    areas = [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in objects]
    return {
        "image_ids": np.array(list(images), dtype=np.int64),
        "sizes": np.array([(height, width) for _, height, width in images.values()], dtype=np.int64),
        "object_ends": np.cumsum([len(by_image.get(number, ())) for number in images], dtype=np.int64),
        "boxes": np.array([entry["bbox"] for entry in objects], dtype=np.float64).reshape(-1, 4),
        "labels": np.array([entry["label"] for entry in objects], dtype=np.int64),
        "crowd": np.array([entry.get("iscrowd", 0) == 1 for entry in objects], dtype=bool),
        "areas": np.array(areas, dtype=np.float64),
        "ids": np.array([entry["id"] for entry in objects], dtype=np.int64),
        **_texts("names", "name_ends", (name for name, _, _ in images.values())),
        **_texts("faults", "fault_ends", (faults.get(number, "") for number in images)),
        **_texts("segmentations", "segmentation_ends", (_packed(entry["segmentation"]) for entry in objects)),
    }


def _packed(segmentation: Any) -> str:
    return json.dumps(segmentation, separators=(",", ":"))


def _texts(data: str, ends: str, texts: Iterable[str]) -> dict[str, np.ndarray]:
    names = Names.of(texts)
    return {data: names.data, ends: names.ends}


def ground_truth(images: CocoImages) -> tuple[dict[str, Any], list[str]]:
    """A split as pycocotools takes it, masks as run lengths; and what is wrong with annotations that are left out."""
    found: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": int(number), "name": name} for number, name in zip(images.category_ids, images.classes, strict=True)
        ],
    }
    problems: list[str] = []
    for index in range(len(images)):
        (height, width), of_image = images.size(index), images.objects(index)
        image_id = int(images.targets[index])
        found["images"].append({"id": image_id, "height": height, "width": width})
        for i, segmentation in enumerate(of_image.segmentations):
            try:
                packed = run_lengths(segmentation, height, width)
            except ValueError as error:
                problems.append(f"{images.name(index)}: annotation {of_image.ids[i]}: {error}")
                continue
            found["annotations"].append(
                {
                    "id": int(of_image.ids[i]),
                    "image_id": image_id,
                    "category_id": int(images.category_ids[of_image.labels[i]]),
                    "bbox": of_image.boxes[i].tolist(),
                    "area": float(of_image.areas[i]),
                    "iscrowd": int(of_image.crowd[i]),
                    "segmentation": packed,
                }
            )
    return found, problems

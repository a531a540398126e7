"""Class folders, ImageNet's layout: ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from contextual_cnn.data.sources.source import ImageFiles
from contextual_cnn.errors import UserError

_EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_LAYOUT = (
    "set data.root=ROOT of ROOT/train/CLASS/IMAGE.jpg and ROOT/val/CLASS/IMAGE.jpg; lists and tar shards: "
    "docs/prepare-data.md"
)


def open_class_folders(root: Path, split: str, classes: tuple[str, ...] | None = None) -> ImageFiles:
    """Lists one split, sorted by class and name, so that an index means the same image on every machine.

    Hidden files and folders and files that are no images are passed over.

    Args:
        classes: the classes that the targets refer to; None takes the split's own folders in sorted order.

    Raises:
        UserError: what was looked for and what was found instead.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"data.root: looked for the folder {folder}, found {describe_folder(root)}", _LAYOUT)
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        hint = (
            f"a flat folder of images needs a list of their classes, {root / split}.txt"
            if _images_in(folder)
            else _LAYOUT
        )
        raise UserError(f"data.root: {folder} has no class folders, found {describe_folder(folder)}", hint)
    if classes is not None and set(found) != set(classes):
        raise UserError(
            f"data.root: {folder} has {len(found)} classes, expected {len(classes)}; {_difference(found, classes)}",
            "every split needs the same class folders as the model was trained on",
        )
    classes = classes if classes is not None else tuple(found)
    return list_class_folders(root, {f"{split}/{name}": target for target, name in enumerate(classes)}, classes)


def list_class_folders(root: Path, folders: Mapping[str, int], classes: tuple[str, ...]) -> ImageFiles:
    """The images of each folder by name, folder after folder.

    Args:
        folders: path below the root -> position in `classes`.

    Raises:
        UserError: a folder has no image.
    """
    paths: list[str] = []
    targets: list[int] = []
    for folder, target in folders.items():
        images = _images_in(root / folder)
        if not images:
            # An empty class would shift no label here, but it is always a broken copy
            raise UserError(f"data.root: class folder {root / folder} has no images", "restore or remove the folder")
        paths += [f"{folder}/{image}" for image in images]
        targets += [target] * len(images)
    return ImageFiles(root, classes, tuple(paths), np.array(targets, dtype=np.int64))


def _images_in(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(_EXTENSIONS) and not entry.name.startswith(".") and entry.is_file()
    )


def describe_folder(folder: Path) -> str:
    """What is there instead of what was looked for."""
    if not folder.exists():
        return f"that {folder} does not exist"
    if not folder.is_dir():
        return f"that {folder} is a file"
    names = sorted(os.listdir(folder))
    if not names:
        return f"that {folder} is empty"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"in {folder}: {', '.join(names[:4])}{more}"


def _difference(found: list[str], expected: tuple[str, ...]) -> str:
    extra, missing = sorted(set(found) - set(expected))[:3], sorted(set(expected) - set(found))[:3]
    parts = [
        f"unexpected: {', '.join(extra)}" if extra else "",
        f"missing: {', '.join(missing)}" if missing else "",
    ]
    return "; ".join(part for part in parts if part)

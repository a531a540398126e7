"""Class folders, ImageNet's layout: ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE.

A class's name is that of its folder, made printable: what is not UTF-8 in it, and control characters, are escaped.
"""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from contextual_cnn.data.sources.folder_listing import (
    IMAGE_FILES,
    FileKind,
    describe_not_read,
    ending_of,
    entries_of,
    is_folder,
    list_files,
)
from contextual_cnn.data.sources.source import ImageFiles
from contextual_cnn.errors import UserError
from contextual_cnn.text import printable

_MAC_LEFTOVER = "__MACOSX"  # what unpacking an archive from a Mac leaves beside the folders; it never holds an image


def open_class_folders(
    root: Path, split: str, classes: tuple[str, ...] | None = None, kind: FileKind = IMAGE_FILES
) -> ImageFiles:
    """Lists one split, sorted by class and name, so that an index means the same image on every machine.

    Subfolders of a class belong to it. Hidden files and folders are passed over, other files counted as not read.

    Args:
        classes: the classes that the targets refer to; None takes the split's own folders in sorted order.

    Raises:
        UserError: what was looked for and what was found instead.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"data.root: looked for the folder {folder}, found {describe_folder(root)}", _layout(kind))
    found, beside = find_class_folders(folder)
    if not found:
        hint = _layout(kind)
        if any(ending in kind.extensions for ending in beside):
            hint = f"a flat folder of {kind.noun}s needs a list of their classes, {root / split}.txt"
        raise UserError(f"data.root: {folder} has no class folders, found {describe_folder(folder)}", hint)
    if classes is not None and set(found) != set(classes):
        raise UserError(
            f"data.root: {folder} has {len(found)} classes, expected {len(classes)}; {_difference(found, classes)}",
            "every split needs the same class folders as the model was trained on",
        )
    classes = classes if classes is not None else tuple(found)
    folders = {f"{split}/{found[name]}": target for target, name in enumerate(classes)}
    return list_class_folders(root, folders, classes, beside, kind)


def _layout(kind: FileKind) -> str:
    split = f"CLASS/{kind.example}"
    others = "; lists and tar shards: docs/prepare-data.md" if kind == IMAGE_FILES else "; lists: docs/video.md"
    return f"set data.root=ROOT of ROOT/train/{split} and ROOT/val/{split}{others}"


def find_class_folders(folder: Path) -> tuple[dict[str, str], Counter[str]]:
    """Each class's folder, sorted by the folders' names; and the kinds of the files beside them, which are not read."""
    names, beside = [], Counter[str]()
    for entry in entries_of(folder):
        if is_folder(entry) and entry.name != _MAC_LEFTOVER:
            names.append(entry.name)
        else:
            beside[_MAC_LEFTOVER if entry.name == _MAC_LEFTOVER else ending_of(entry)] += 1
    found: dict[str, str] = {}
    for name in sorted(names):
        if printable(name) in found:
            raise UserError(f"data.root: {folder} has two folders for the class {name}", "rename one of them")
        found[printable(name)] = name
    return found, beside


def list_class_folders(
    root: Path,
    folders: Mapping[str, int],
    classes: tuple[str, ...],
    beside: Counter[str],
    kind: FileKind = IMAGE_FILES,
) -> ImageFiles:
    """The files of each folder, folder after folder.

    Args:
        folders: path below the root -> position in `classes`.
        beside: files beside the folders, by kind.

    Raises:
        UserError: a folder has none.
    """
    paths: list[str] = []
    targets: list[int] = []
    not_read = Counter({f"{ending} beside the class folders": count for ending, count in beside.items()})
    for folder, target in folders.items():
        files, others = list_files(root / folder, kind)
        if not files:
            # An empty class would shift no label here, but it is always a broken copy
            found, fix = "", "restore or remove the folder"
            if others:
                found, fix = (
                    f", but {describe_not_read(others)}",
                    f"convert them; {', '.join(kind.extensions)} are read",
                )
            raise UserError(f"data.root: class folder {root / folder} has no {kind.noun}s{found}", fix)
        paths += [f"{folder}/{file}" for file in files]
        targets += [target] * len(files)
        not_read += others
    return ImageFiles(root, classes, paths, np.array(targets, dtype=np.int64), not_read)


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


def _difference(found: Mapping[str, str], expected: tuple[str, ...]) -> str:
    extra, missing = sorted(set(found) - set(expected))[:3], sorted(set(expected) - set(found))[:3]
    parts = [
        f"unexpected: {', '.join(extra)}" if extra else "",
        f"missing: {', '.join(missing)}" if missing else "",
    ]
    return "; ".join(part for part in parts if part)

"""The images (or videos) below a folder, as torchvision's ImageFolder reads them, and how many files are not read.

A directory's entries bring their kinds along, so 1.28 million files are listed without a look at any one of them.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contextual_cnn.errors import UserError
from contextual_cnn.text import printable


@dataclass(frozen=True)
class FileKind:
    """The files that make a data set. noun: of one. example: its name in messages. extensions: in lower case."""

    noun: str
    example: str
    extensions: tuple[str, ...]


IMAGE_FILES = FileKind("image", "IMAGE.jpg", (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"))
VIDEO_FILES = FileKind(
    "video",
    "VIDEO.mp4",
    (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv", ".flv", ".wmv", ".3gp"),
)


def list_files(folder: Path, kind: FileKind = IMAGE_FILES) -> tuple[list[str], Counter[str]]:
    """A folder's own files of a kind by name, then those of its subfolders, which are in the order of their paths.

    Hidden files and folders do not count. A folder that several links reach is read once, so that a loop of links ends.

    Returns:
        Paths below the folder; and the number of files that are not read, by kind (".heic": 5).
    """
    found: dict[str, list[str]] = {}
    not_read: Counter[str] = Counter()
    folders, links, seen = deque([""]), deque[str](), set()
    while folders or links:
        below = (folders or links).popleft()
        place = _place_of(folder / below)
        if place in seen:
            not_read["link to a folder that is read already"] += 1
            continue
        seen.add(place)
        names, subfolders = [], []
        for entry in entries_of(folder / below):
            if is_folder(entry):
                subfolders.append((entry.name, entry.is_symlink()))
            elif _is_of(kind, entry):
                names.append(entry.name)
            else:
                not_read[ending_of(entry, kind)] += 1
        found[below] = sorted(names)
        for name, is_link in sorted(subfolders):
            (links if is_link else folders).append(os.path.join(below, name))
    return [os.path.join(below, name) for below in sorted(found) for name in found[below]], not_read


def entries_of(folder: Path) -> Iterator[os.DirEntry]:
    """What is in a folder, in no order, but for what is hidden. Raises UserError if the folder cannot be read."""
    with _errors_named(folder), os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is one, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def ending_of(entry: os.DirEntry, kind: FileKind = IMAGE_FILES) -> str:
    """What a file that is not read is counted as: its ending."""
    ending = printable(os.path.splitext(entry.name)[1].lower())
    if ending in kind.extensions and not _is_of(kind, entry):
        return f"{ending} that is not a file"
    return ending or "without an ending"


def describe_not_read(not_read: Counter[str]) -> str:
    """5 .heic, 2 .gif"""
    kinds = sorted(not_read, key=lambda kind: (-not_read[kind], kind))
    others = sum(not_read[kind] for kind in kinds[5:])
    parts = [f"{not_read[kind]} {kind}" for kind in kinds[:5]]
    return ", ".join(parts + ([f"{others} others"] if others else []))


def _is_of(kind: FileKind, entry: os.DirEntry) -> bool:
    try:
        return entry.name.lower().endswith(kind.extensions) and entry.is_file()
    except OSError:  # a link to itself
        return False


def _place_of(folder: Path) -> tuple[int, int]:
    """What two paths to the same folder have in common."""
    with _errors_named(folder):
        found = os.stat(folder)
    return found.st_dev, found.st_ino


@contextmanager
def _errors_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.root: the folder {folder} cannot be read: {error.strerror}", "make it readable, or see to the disk"
        ) from error

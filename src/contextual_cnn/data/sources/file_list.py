"""Images in any folders below the root, and a list with the class of each: ROOT/train.txt and ROOT/val.txt.

A line is `relative/path class_index`, with blanks or tabs in between. Of videos it may be `relative/path frames
class_index`, as in TSM's lists; the number is passed over, for frames are counted in the file. Files are not looked for
one by one at opening, which would take minutes on a network file system: scripts/data/check_data.py does that, and
reading names the file that is missing.
"""

import os
import posixpath
import re
from pathlib import Path

import numpy as np

from contextual_cnn.data.sources.class_names import (
    check_no_class_is_empty,
    number_classes,
    read_class_names,
    read_lines,
)
from contextual_cnn.data.sources.folder_listing import IMAGE_FILES, VIDEO_FILES, FileKind
from contextual_cnn.data.sources.source import ImageFiles
from contextual_cnn.errors import UserError

_LINE = "`relative/path class_index`"


def open_file_list(
    root: Path, split: str, classes: tuple[str, ...] | None = None, kind: FileKind = IMAGE_FILES
) -> ImageFiles:
    """Reads the list of one split; an image's index is its place in the list.

    Args:
        classes: the classes that the indices refer to; None takes classes.txt, or numbers.

    Raises:
        UserError: naming the file and the line.
    """
    file = root / f"{split}.txt"
    if not file.is_file():
        found = f"{file} is not a file" if os.path.lexists(file) else f"there is no list {file}"
        raise UserError(f"data.root: {found}", f"its lines are {_LINE}")
    names = read_class_names(root, classes)
    lines_of: dict[str, int] = {}
    targets: list[int] = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line:
            continue
        where = f"{file}, line {number}"
        path, target = _parse(line, where)
        if kind == VIDEO_FILES and not path.lower().endswith(kind.extensions):
            path = re.sub(r"\s+\d+$", "", path)
        if path in lines_of:
            raise UserError(f"{where}: {path} is in line {lines_of[path]} already", f"list every {kind.noun} once")
        if names is not None and target >= len(names):
            raise UserError(
                f"{where}: class {target}, but there are {len(names)} classes, 0 to {len(names) - 1}",
                f"correct the line, or {root / 'classes.txt'}",
            )
        lines_of[path] = number
        targets.append(target)
    if not targets:
        raise UserError(f"{file} lists no {kind.noun}s", f"a line is {_LINE}")
    paths, numbers = tuple(lines_of), np.array(targets, dtype=np.int64)
    if not (root / paths[0]).is_file():
        raise UserError(f"{file} begins with {paths[0]}, but there is no file {root / paths[0]}", "set data.root=ROOT")
    names = names if names is not None else number_classes(numbers, file)
    if classes is None:  # a val split may be a sample without every class
        check_no_class_is_empty(names, numbers, file)
    return ImageFiles(root, names, paths, numbers)


def _parse(line: str, where: str) -> tuple[str, int]:
    path, target = ["", *line.rsplit(maxsplit=1)][-2:]
    if not path or not target.isdecimal() or len(target) > 9:
        separator = re.fullmatch(r".+([,;|])\s*\d+", line)
        fix = f"a blank or a tab instead of {separator[1]!r}" if separator else "class indices count from 0"
        raise UserError(f"{where}: {line[:80]!r} is not {_LINE}", fix)
    if path.startswith("/") or ".." in path.split("/") or not path.isprintable():
        raise UserError(f"{where}: {path!r} is no path below the root", "list paths relative to data.root, without ..")
    return posixpath.normpath(path), int(target)

"""The names of the classes where the images come with numbers: ROOT/classes.txt, one name a line."""

import os
from pathlib import Path

import numpy as np

from contextual_cnn.errors import UserError
from contextual_cnn.text import printable


def read_class_names(root: Path, expected: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names in classes.txt, else the expected ones; None where neither is known.

    Raises:
        UserError: no text file; empty, repeated or unprintable names, or others than the expected.
    """
    file = root / "classes.txt"
    if not os.path.lexists(file):
        return expected
    names = tuple(read_lines(file))
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if not name or name in seen:
            raise UserError(
                f"{file}, line {number}: {f'the class {name} again' if name else 'no name'}",
                "one class a line, each once; the first line is class 0",
            )
        if printable(name) != name:
            raise UserError(f"{file}, line {number}: the name {name} is not printable", "remove control characters")
        seen.add(name)
    if expected is not None and names != expected:
        raise UserError(
            f"{file} has {len(names)} classes that are not, in this order, the {len(expected)} expected ones",
            f"the expected ones begin with {', '.join(expected[:3])}",
        )
    return names


def number_classes(targets: np.ndarray, where: Path) -> tuple[str, ...]:
    """Names for classes without names: "0", "1", ...

    Raises:
        UserError: a number that leaves classes without an image; it may be too large to count up to it.
    """
    largest = int(targets.max())
    if largest >= len(targets):
        raise UserError(
            f"{where} has an image of class {largest}, but only {len(targets)} images: classes in between have none",
            "class indices count from 0 without gaps",
        )
    return tuple(str(target) for target in range(largest + 1))


def check_no_class_is_empty(classes: tuple[str, ...], targets: np.ndarray, where: Path) -> None:
    """Raises UserError naming the first class that has no image."""
    missing = np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 0)
    if len(missing):
        first = missing[0]
        raise UserError(
            f"{where}: {len(missing)} of {len(classes)} classes have no image, the first is class {first} "
            f"({classes[first]})",
            "class indices count from 0 without gaps; see classes.txt in the root",
        )


def read_lines(file: Path, errors: str = "strict") -> list[str]:
    """The lines of a text file without surrounding blanks, and without the mark that Windows puts at its beginning.

    Args:
        errors: what becomes of bytes that are not UTF-8, as `open` has it.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig", errors=errors).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a text file: {error}", "it must be a readable UTF-8 file") from error

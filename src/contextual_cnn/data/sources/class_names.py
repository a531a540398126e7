"""The names of the classes where the images come with numbers: ROOT/classes.txt, one name a line."""

from pathlib import Path

import numpy as np

from contextual_cnn.errors import UserError


def read_class_names(root: Path, expected: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names in classes.txt, else the expected ones; None where neither is known.

    Raises:
        UserError: empty or repeated names, or others than the expected.
    """
    file = root / "classes.txt"
    if not file.is_file():
        return expected
    names = tuple(read_lines(file))
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if not name or name in seen:
            raise UserError(
                f"{file}, line {number}: {f'the class {name} again' if name else 'no name'}",
                "one class a line, each once; the first line is class 0",
            )
        seen.add(name)
    if expected is not None and names != expected:
        raise UserError(
            f"{file} has {len(names)} classes that are not, in this order, the {len(expected)} expected ones",
            f"the expected ones begin with {', '.join(expected[:3])}",
        )
    return names


def number_classes(targets: np.ndarray) -> tuple[str, ...]:
    """Names for classes without names: "0", "1", ..."""
    return tuple(str(target) for target in range(int(targets.max()) + 1))


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


def read_lines(file: Path) -> list[str]:
    """The lines of a text file without surrounding blanks.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a text file: {error}", "it must be a readable UTF-8 file") from error

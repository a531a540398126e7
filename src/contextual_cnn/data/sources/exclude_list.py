"""Images to leave out: a text file with the names that the source gives them, one a line; # begins a comment line.

A name may stand there as the disk has it, too: bytes that are not UTF-8 are taken for the escapes that stand for them.
"""

from collections.abc import Iterable
from pathlib import Path

from contextual_cnn.data.sources.class_names import read_lines
from contextual_cnn.text import printable


def read_exclude_list(path: Path) -> frozenset[str]:
    """The names in the file. Raises UserError if it cannot be read."""
    lines = read_lines(path, errors="surrogateescape")
    return frozenset(printable(line) for line in lines if line and not line.startswith("#"))


def write_exclude_list(path: Path, reasons: Iterable[tuple[str, str]]) -> None:
    """Writes (name, reason) pairs; the reason becomes a comment above the name."""
    path.write_text("".join(f"# {reason}\n{name}\n" for name, reason in reasons), encoding="utf-8")

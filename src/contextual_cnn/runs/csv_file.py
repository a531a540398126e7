"""CSV files that a spreadsheet shows and does not execute, whatever the files and classes are called."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from contextual_cnn.text import printable

_FORMULA = tuple("=+-@\t\uff1d\uff0b\uff0d\uff20")  # the last four are the full-width ones


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """A line for each row, the header being the first, in UTF-8.

    Texts are written printable. One that a spreadsheet would take for a formula gets a ' before it, as OWASP advises
    (https://owasp.org/www-community/attacks/CSV_Injection). Numbers stay as they are.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([_cell(value) for value in row] for row in rows)


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) else text

"""Names that come from outside (of files, classes, archives) as text that is safe to print, to log and to write."""

import io
import re
import sys

# Control characters but the tab, separators of lines, what turns the direction of writing, and the lone surrogates
# by which Python stands for the bytes of a file name that are not UTF-8
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text in one line of valid Unicode: `a<newline>b` becomes `a\nb`, the byte 0xE9 of a file name `\xe9`.

    A name could otherwise forge a line of the log, send commands to the terminal, or fail to be encoded.
    """
    return text if text.isprintable() else _UNSAFE.sub(_escape, text)


def shorten(text: str, longest: int = 200) -> str:
    """The beginning of a text that a hostile file may have made millions of characters long."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


def print_any_text() -> None:
    """From now on, a character that the terminal's encoding lacks is printed as an escape; before, it is an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _escape(found: re.Match) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()

"""Names from outside, on a terminal, in a log and in a file."""

import io
import os
import sys

import pytest

from contextual_cnn.errors import UserError, run_script
from contextual_cnn.text import printable, shorten


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/café/日本 1.jpg", "train/café/日本 1.jpg"),
        ("tab\tand\u00a0blanks\u3000stay, \u200dtoo", "tab\tand\u00a0blanks\u3000stay, \u200dtoo"),
        ("a\x1b[31m\nerror: fine\r\x00\x7f\x9b", r"a\x1b[31m\nerror: fine\r\x00\x7f\x9b"),
        ("gpj.\u202eexe\u2066\u2028", r"gpj.\u202eexe\u2066\u2028"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_could_do_harm_is_escaped_and_nothing_else(name, expected):
    assert printable(name) == expected
    expected.encode()


def test_a_long_text_is_cut():
    assert shorten("x" * 200) == "x" * 200
    assert len(shorten("x" * 10**6)) < 250


def test_an_error_cannot_forge_another_line():
    error = UserError("no class a\x1b[2J\nerror: all is well", "rename a\nb")
    assert str(error).splitlines() == [r"no class a\x1b[2J\nerror: all is well", r"  fix: rename a\nb"]


def test_a_terminal_that_knows_ascii_only_is_printed_to(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_script(lambda: print("café \udce9"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"caf\\xe9 \\udce9\n"

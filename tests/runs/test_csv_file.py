"""Cells that a spreadsheet, a terminal and any CSV reader take for texts."""

import csv

import pytest

from contextual_cnn.runs.csv_file import write_csv


def cells(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [row[0] for row in csv.reader(file)]


@pytest.mark.parametrize(
    "formula", ["=cmd|'/c calc'!A1", '=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1", "\uff1d1"]
)
def test_a_formula_becomes_a_text(tmp_path, formula):
    write_csv(tmp_path / "a.csv", [["name"], [formula]])
    assert cells(tmp_path / "a.csv") == ["name", f"'{formula}"]


def test_numbers_and_ordinary_texts_stay_and_odd_names_are_printable(tmp_path):
    values = [-0.5, 3, "0.250000", "dog, tame", 'a "b"', "n01440764", "café", "a=b", ""]
    write_csv(tmp_path / "a.csv", [[value] for value in [*values, "a\nb\x1b[31m", "\udce9.jpg", "\r=1"]])
    assert cells(tmp_path / "a.csv")[: len(values)] == [str(value) for value in values]
    assert cells(tmp_path / "a.csv")[len(values) :] == [r"a\nb\x1b[31m", r"\xe9.jpg", r"\r=1"]

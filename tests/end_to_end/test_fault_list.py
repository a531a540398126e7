"""faults.toml is complete, and what it says shows a fault is there."""

import tomllib
from pathlib import Path

from tests.helpers.documentation import ROOT, is_test

ROWS = tomllib.loads((Path(__file__).parents[1] / "faults.toml").read_text())["row"]


def test_every_row_is_there_once_and_is_shown_or_says_why_not():
    assert [row["id"] for row in ROWS] == [*map(str, range(1, 121)), *(f"S{i}" for i in range(1, 25))]
    for row in ROWS:
        assert row.keys() - {"not_shown"} == {"id", "fault", "must_happen", "shown_by"}, row["id"]
        assert row["fault"], row["id"]
        assert row["must_happen"], row["id"]
        assert row["shown_by"] or row["not_shown"], row["id"]


def test_everything_that_shows_a_fault_exists():
    names = {name for row in ROWS for name in row["shown_by"]}
    tests = {name for name in names if "::" in name}
    assert [name for name in sorted(tests) if not is_test(name)] == []
    suite = (ROOT / "tests" / "fault_suite.py").read_text()
    for name in names - tests:
        assert f'"{name}": ' in suite, name

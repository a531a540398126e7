"""docs/trials.md: every trial is there, and shown by a test that exists or with the reason why not."""

import re

from tests.helpers.documentation import ROOT, is_test

ROWS = re.findall(r"^\| (\d+b?) \|.*\| (.*) \|$", (ROOT / "docs" / "trials.md").read_text(), re.MULTILINE)


def test_every_trial_is_shown_or_tells_why_not():
    assert [number for number, _ in ROWS] == [*map(str, range(1, 46)), "45b", *map(str, range(46, 100))]
    assert [number for number, shown in ROWS if not shown.strip()] == []
    named = {name for _, shown in ROWS for name in re.findall(r"`(tests/[^`]+)`", shown)}
    assert [name for name in sorted(named) if not is_test(name)] == []
    assert len(named) > 60

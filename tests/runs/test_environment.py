"""What scripts report."""

import json
from pathlib import Path

from contextual_cnn.runs.environment import Report, print_report


def test_a_report_is_whole_after_every_finding(tmp_path, capsys):
    output = tmp_path / "new" / "report.json"
    report, checks = Report(output, machine="here", checks=[]), []
    assert json.loads(output.read_text()) == {"machine": "here", "checks": [], "incomplete": True}
    for i in range(2):
        checks.append(i)
        report.add({"check": i}, checks=checks)
        assert json.loads(output.read_text()) == {"machine": "here", "checks": checks, "incomplete": True}
        assert json.loads(capsys.readouterr().out) == {"check": i}
    report.finish(passed=True)
    assert json.loads(output.read_text()) == {"machine": "here", "checks": [0, 1], "passed": True}
    assert capsys.readouterr().out == output.read_text()
    assert list(output.parent.iterdir()) == [output]


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    print_report({"found": 1}, link)
    assert link.readlink() == Path("/dev/null")

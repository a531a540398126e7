"""scripts/cluster/plan_cluster.py from the command line."""

import json

import pytest

from tests.conftest import run_command
from tests.helpers.facts import tells

pytestmark = pytest.mark.run

SMALL = ("scripts/cluster/plan_cluster.py", "--model", "contextual_convnext_atto", "--gpus", "1", "8")


def test_the_speed_comes_from_an_argument_a_dry_run_or_a_run(tmp_path):
    forecast, metrics = tmp_path / "dry_run.json", tmp_path / "metrics.jsonl"
    forecast.write_text(json.dumps({"images_per_second": 2400.0, "processes": 2}))
    speeds = (1000.0, 4800.0, 4900.0)  # the first steps are slow; the median is not
    rows = [{"step": i, "train/images_per_second": speed} for i, speed in enumerate(speeds)] + [{"step": 3}]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plans = []
    for speed in (
        ["--images-per-second", "1200"],
        ["--measured", str(forecast)],
        ["--measured", str(metrics), "--measured-gpus", "4"],
    ):
        done = run_command(*SMALL, *speed, "--json")
        assert done.returncode == 0, done.stderr
        plans.append(json.loads(done.stdout))
    assert plans[0] == plans[1] == plans[2]
    one, eight = plans[0]["rows"]
    assert one["step"] == pytest.approx(4096 / 1200, rel=1e-4)  # and a checkpoint an epoch
    assert eight["all_reduce"] == pytest.approx(2 * 7 / 8 * plans[0]["training"]["gradient_bytes"] / 200e9)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--images-per-second", "1200", "--gpus", "8192"], ["8192", "4096"]),
        (["--measured", "README.md"], ["README.md"]),
        (["--measured", "/nowhere.json"], ["/nowhere.json"]),
    ],
)
def test_mistakes_have_a_cause_and_a_fix(arguments, facts):
    done = run_command(*SMALL, *arguments)
    assert done.returncode == 2
    assert tells(done.stderr, *facts)
    assert "fix: " in done.stderr


def test_the_help_states_the_formulas():
    printed = run_command("scripts/cluster/plan_cluster.py", "--help").stdout
    assert "2 (n-1)/n * G / w" in printed

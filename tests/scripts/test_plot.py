"""Runs overlaid in one picture."""

import json

import pytest
from PIL import Image

from tests.conftest import run_command
from tests.helpers.facts import tells

pytestmark = pytest.mark.run


@pytest.fixture
def runs(tmp_path):
    for name, scale in (("one", 1.0), ("two$", 1.2)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "train/loss": 5 - step / 10} for step in range(1, 31)]
        rows += [{"step": 10 * i, "val/top1": 20 * scale * (i + i % 2)} for i in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4')
    return tmp_path / "one", tmp_path / "two$"


def plot(*arguments):
    return run_command("scripts/analysis/plot.py", *map(str, arguments))


@pytest.mark.parametrize(
    ("metric", "found"),
    [("val/top1", "3 points, last 80, best 80 at step 30"), ("train/loss", "30 points, last 2, best 2 at step 30")],
)
def test_runs_are_overlaid(runs, tmp_path, metric, found):
    done = plot(*runs, "--metric", metric, "--output", tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert f"{runs[0]}: {found}" in done.stdout
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (960, 600)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_a_metric_that_there_is_not_is_explained(runs):
    done = plot(*runs, "--metric", "val/top")
    assert done.returncode == 2
    assert tells(done.stderr, "--metric", "val/top1?")


def test_a_folder_that_is_no_run_is_explained(tmp_path):
    done = plot(tmp_path)
    assert done.returncode == 2
    assert "fix: " in done.stderr

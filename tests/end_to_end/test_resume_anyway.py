"""A run that goes on under other values, by force: resume=anyway."""

import re
import shlex

import pytest

from contextual_cnn.runs.loggers import read_metrics
from tests.helpers.facts import tells
from tests.helpers.kills import smallest_run
from tests.helpers.quick_start import run

pytestmark = pytest.mark.run


def test_the_configs_values_win_and_the_schedule_is_that_of_the_new_length(image_root, tmp_path):
    """In a folder with spaces and umlauts, which must not matter but for the quotes that Hydra wants."""
    folder = tmp_path / "mit Leerzeichen und Umläuten"
    status, printed = run(*smallest_run(image_root, folder), output=tmp_path / "output")
    assert status == 2
    quoted = f"'{folder}'"
    (typed,) = re.findall(r"fix: .*?: (.*)$", printed, re.MULTILINE)
    assert shlex.split(typed) == [f"output_dir={quoted}"]
    first = smallest_run(image_root, quoted, "trainer.max_steps=4")
    status, printed = run(*first, output=tmp_path / "output")
    assert status == 0, printed
    longer = smallest_run(image_root, quoted, "schedule.epochs=3", "optimizer.lr=0.004", "optimizer.weight_decay=0.5")
    status, printed = run(*longer, output=tmp_path / "output")
    assert status == 2
    for facts in (
        ("optimizer.lr", "0.001", "0.004"),
        ("optimizer.weight_decay", "0.05", "0.5"),
        ("schedule.epochs", "8"),
    ):
        assert tells(printed, *facts)
    status, printed = run(*longer, "resume=anyway", output=tmp_path / "output")
    assert status == 0, printed
    assert tells(printed, "schedule.epochs", "8", "3")
    assert tells(printed, "optimizer.lr", "0.001", "0.004")
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    assert sorted(rates) == list(range(1, 10))
    assert max(rates[step] for step in (1, 2, 3, 4)) == pytest.approx(0.001, rel=0.01)
    # Step 5 is the second after one epoch of warm-up, of six that go down by the cosine
    assert rates[5] == pytest.approx(0.004, rel=0.1)
    assert rates[9] < 0.0005

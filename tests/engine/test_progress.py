"""What a person sees of a run that goes on."""

import io
import logging
import re

import pytest
from rich.console import Console

from contextual_cnn.engine.progress import ProgressDisplay, describe, describe_evaluation

METRICS = {
    "train/loss": 5.0,
    "train/loss_stage3": 2.0,
    "train/loss_stage4": 3.0,
    "train/recall_stage3": 61.0,
    "train/lr": 1e-3,
    "train/images_per_second": 812.0,
    "train/data_wait": 3.0,
    "train/host_memory_gib": 2.0,
    "train/memory_gib": 41.5,
}
TOLD = (
    "loss 5.000 (s3 2.00 s4 3.00)",
    "recall s3 61 %",
    "lr 1.00e-03",
    "812 img/s",
    "data wait 3 %",
    "memory 41.5 GiB",
)


@pytest.mark.parametrize("terminal", [True, False])
def test_each_report_is_a_line_and_a_terminal_has_a_bar_below(terminal, caplog):
    """The narrowest terminal has room for the bar, the count and the time that is left."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=80)
    with caplog.at_level(logging.INFO), ProgressDisplay(console, steps=20, steps_per_epoch=8, first_step=4) as progress:
        progress.advance(10)
        progress.report(10, METRICS)
    (record,) = caplog.records
    assert record.message.startswith("epoch 2 step 10/20: ")
    assert [part for part in TOLD if part not in record.message] == []
    assert re.search(r"eta \d+:\d\d:\d\d$", record.message)
    shown = [line for line in screen.getvalue().splitlines() if "10/20" in line]
    assert bool(shown) == terminal
    assert all("━" in line and "eta" in line and "…" not in line for line in shown)


@pytest.mark.parametrize(("speed", "told"), [(9523.4, "9,523 img/s"), (812.0, "812 img/s"), (3.456, "3.46 img/s")])
def test_a_speed_is_a_number_that_can_be_read(speed, told):
    assert told in describe(METRICS | {"train/images_per_second": speed})
    assert describe_evaluation({"raw": {"top1": 1.0, "top5": 2.0, "images_per_second": speed}}).endswith(told)


def test_an_evaluation_names_the_stage_of_each_recall():
    report = {"top1": 50.0, "top5": 80.0, "recall_stage2": 90.0, "recall_stage3": 70.0, "images_per_second": 100.0}
    assert "recall s2 90 s3 70 %" in describe_evaluation({"raw": report})

"""What a person sees of a run that goes on."""

import io
import logging
import re

import pytest
from rich.console import Console

from contextual_cnn.engine.progress import ProgressDisplay, describe_evaluation

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
def test_a_terminal_gets_a_bar_and_a_file_a_line_for_each_report(terminal, caplog):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=300)
    with caplog.at_level(logging.INFO), ProgressDisplay(console, steps=20, steps_per_epoch=8, first_step=4) as progress:
        progress.advance(10)
        progress.report(10, METRICS)
    shown = screen.getvalue() if terminal else caplog.text
    assert "epoch 2 step 10/20" in shown
    assert [part for part in TOLD if part not in shown] == []
    assert ("10/20" in screen.getvalue()) == terminal
    assert bool(caplog.records) != terminal
    if not terminal:
        assert re.search(r"eta \d+:\d\d:\d\d$", caplog.records[0].message)


def test_an_evaluation_names_the_stage_of_each_recall():
    report = {"top1": 50.0, "top5": 80.0, "recall_stage2": 90.0, "recall_stage3": 70.0, "images_per_second": 100.0}
    assert "recall s2 90 s3 70 %" in describe_evaluation({"raw": report})

"""What a person sees of a run that goes on."""

import io
import logging
import re

import pytest
from rich.console import Console

from contextual_cnn.engine.progress import ProgressDisplay, describe_speed

METRICS = {
    "lr": 1e-3,
    "images_per_second": 812.0,
    "data_wait": 3.0,
    "host_memory_gib": 2.0,
    "memory_gib": 41.5,
}
TOLD = ("loss 5.000", "lr 1.00e-03", "812 img/s", "data wait 3 %", "memory 41.5 GiB")


@pytest.mark.parametrize("terminal", [True, False])
def test_each_report_is_a_line_and_a_terminal_has_a_bar_below(terminal, caplog):
    """The narrowest terminal has room for the bar, the count and the time that is left."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=80)
    with caplog.at_level(logging.INFO), ProgressDisplay(console, steps=20, steps_per_epoch=8, first_step=4) as progress:
        progress.advance(10)
        progress.report(10, "loss 5.000", METRICS)
    (record,) = caplog.records
    assert record.message.startswith("epoch 2 step 10/20: ")
    assert [part for part in TOLD if part not in record.message] == []
    assert re.search(r"eta \d+:\d\d:\d\d$", record.message)
    shown = [line for line in screen.getvalue().splitlines() if "10/20" in line]
    assert bool(shown) == terminal
    assert all("━" in line and "eta" in line and "…" not in line for line in shown)


@pytest.mark.parametrize(("speed", "told"), [(9523.4, "9,523 img/s"), (812.0, "812 img/s"), (3.456, "3.46 img/s")])
def test_a_speed_is_a_number_that_can_be_read(speed, told):
    assert describe_speed({"images_per_second": speed}) == told

"""What a person sees of an evaluation: noise and other data are in the title."""

import io

import pytest
from rich.console import Console

from contextual_cnn.tasks.image_classification.tables import ranking, report_table

REPORT = {
    "checkpoint": "runs/[one]/best.pt",
    "weights": "ema",
    "step": 10,
    "top1": 50.0,
    "top1_interval": [40.0, 60.0],
    "top5": 80.0,
    "recall_stage3": 91.25,
    "mean_f1": 49.0,
    "loss": 1.5,
    "calibration_error": 3.0,
    "classes": 10,
    "images": 100,
    "bad_images": 0,
    "images_per_second": 900.0,
    "loader": "dali",
    "noise": False,
    "differences": {},
}


def printed(table):
    console = Console(file=io.StringIO(), width=150)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, []), ({"noise": True}, ["NOISE"]), ({"differences": {"limit": 200}}, ["data.limit=200"])],
    ids=["the run's own", "noise", "a part"],
)
def test_the_title_has_what_is_unusual(changes, words):
    title = printed(report_table("model", REPORT | changes)).partition("measure")[0]
    assert "runs/[one]/best.pt" in title
    assert [word for word in ("NOISE", "data.limit=200") if word in title] == words


def test_a_recall_stands_beside_its_stage():
    (line,) = (line for line in printed(report_table("model", REPORT)).splitlines() if "shortlist" in line)
    assert "stage 3" in line
    assert "91.25 %" in line


def test_several_are_ranked_and_noise_is_marked():
    better = REPORT | {"checkpoint": "better.pt", "top1": 60.0, "noise": True}
    rows = [line for line in printed(ranking([REPORT, better])).splitlines() if ".pt" in line]
    assert ["NOISE" in row for row in rows] == [True, False]

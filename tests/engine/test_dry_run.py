"""trainer.dry_run=true, by its real command: what it says is what the run then does, and it leaves no other trace."""

import json
import math

import pytest
from PIL import Image

from tests.conftest import run_group, small_run
from tests.helpers.facts import tells
from tests.helpers.overrides import CROPS_ALONE
from tests.helpers.quick_start import run

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def rehearsed(image_root, tmp_path_factory):
    """A dry run; its folder, its JSON and what it printed."""
    folder = tmp_path_factory.mktemp("rehearsed")
    arguments = small_run(image_root, folder, "trainer.dry_run=true", *CROPS_ALONE)
    status, printed = run(*arguments, output=folder / "output", COLUMNS="200")
    assert status == 0, printed
    return folder, json.loads((folder / "run" / "dry_run.json").read_text()), printed


def test_nothing_but_the_forecast_and_its_picture_is_written(rehearsed):
    folder, _, _ = rehearsed
    assert {path.name for path in (folder / "run").iterdir()} == {"dry_run.json", "lr_schedule.png"}
    with Image.open(folder / "run" / "lr_schedule.png") as picture:
        assert picture.width > picture.height > 300


def test_it_says_what_was_found_and_what_it_will_take(rehearsed):
    _, forecast, printed = rehearsed
    assert forecast["images"] == {"train": 48, "val": 18}
    assert (forecast["steps_per_epoch"], forecast["steps"], forecast["first_step"]) == (3, 12, 0)
    assert forecast["measured_steps"] * forecast["accumulation"] >= 8
    assert forecast["images_per_second"] * forecast["seconds_per_step"] == pytest.approx(16)
    assert forecast["seconds_left"] == pytest.approx(12 * forecast["seconds_per_step"])
    assert 2**27 < forecast["peak_memory"] < forecast["memory"]
    assert math.isfinite(forecast["loss"])
    assert tells(printed, "16", "8", "images", "2", "1", "processes", "3", "epoch")
    # Warm-up of 3 steps to 1e-3, then a cosine over 9 of which the last is step 11
    low, high = 1e-6, 1e-3
    last = low + (high - low) * (1 + math.cos(math.pi * 8 / 9)) / 2
    assert tells(printed, "0", "0.001", "step", "3", f"{last:.3g}")


def test_the_run_then_writes_a_checkpoint_of_the_size_foretold(rehearsed, image_root):
    folder, forecast, _ = rehearsed
    status, printed = run(*small_run(image_root, folder, "trainer.max_steps=4", *CROPS_ALONE), output=folder / "output")
    assert status == 0, printed
    size = (folder / "run" / "checkpoints" / "last.pt").stat().st_size
    assert forecast["checkpoint"] == pytest.approx(size, rel=0.01)

    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    arguments = small_run(image_root, folder, "trainer.dry_run=true", *CROPS_ALONE)
    status, printed = run(*arguments, output=folder / "output", COLUMNS="200")
    assert status == 0, printed
    assert tells(printed, "12", "4")
    after = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert {"dry_run.json"} <= changed <= {"dry_run.json", "lr_schedule.png"}


def test_two_processes_rehearse_together(image_root, tmp_path):
    done = run_group(2, *small_run(image_root, tmp_path, "trainer.dry_run=true", *CROPS_ALONE))
    assert done.returncode == 0, done.stderr
    forecast = json.loads((tmp_path / "run" / "dry_run.json").read_text())
    assert (forecast["processes"], forecast["micro_batch"], forecast["accumulation"]) == (2, 8, 1)
    assert done.stdout.count("whole run at that speed") == 1


def test_a_folder_that_cannot_be_written_is_found_out_now(image_root, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = small_run(image_root, tmp_path / "file", "trainer.dry_run=true", *CROPS_ALONE)
    status, printed = run(*arguments, output=tmp_path / "output")
    assert status == 2
    assert "output_dir" in printed

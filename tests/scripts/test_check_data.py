"""Damaged images are found in every layout, and training runs without them."""

import json
import os
import re
import shutil
import sys

import pytest
import torch

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.distributed import World
from contextual_cnn.errors import run_script
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from scripts.data import check_data
from tests.conftest import small_run
from tests.helpers.facts import tells
from tests.helpers.layouts import LAYOUTS, write_layout
from tests.helpers.overrides import CROPS_ALONE
from tests.helpers.quick_start import run


@pytest.fixture
def check(monkeypatch, capfd):
    """Runs the script's main in this process, which forks nothing; returns exit status and what was printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_data.py", "--workers", "1", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_script(check_data.main)
        captured = capfd.readouterr()
        return stopped.value.code, captured.out + captured.err

    return run


@pytest.fixture
def damaged(image_root, tmp_path):
    """Class folders with four bad files, a PNG under a false name and a copy of a training image in val."""
    root = tmp_path / "damaged"
    shutil.copytree(image_root, root)
    folder = root / "train" / "class_1"
    (folder / "0.JPEG").write_bytes((folder / "0.JPEG").read_bytes()[:1000])
    (folder / "1.JPEG").write_bytes(b"")
    (folder / "2.JPEG").write_bytes(b"<html>404</html>")
    (root / "val" / "class_2" / "0.JPEG").write_bytes(b"GIF89a" + b"x" * 100)
    from PIL import Image

    Image.open(folder / "3.JPEG").save(folder / "3.JPEG", format="PNG")
    shutil.copy(root / "train" / "class_0" / "5.JPEG", root / "val" / "class_0" / "2.JPEG")
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_images_are_found_and_training_runs_without_them(damaged, check, tmp_path, layout):
    root = write_layout(layout, damaged, tmp_path / "root")
    exclude, output = tmp_path / "exclude.txt", tmp_path / "report.json"
    status, printed = check(root, "--write-exclude", exclude, "--output", output, "--duplicates")
    assert status == 1
    report = json.loads(output.read_text())
    assert report["layout"] == layout
    train, val = report["splits"]["train"], report["splits"]["val"]
    assert (train["images"], train["classes"], val["images"]) == (48, 6, 18)
    assert train["images_per_class"] == {"least": 8, "most": 8}
    assert train["kinds"] == {"JPEG": 44, "PNG": 1, "PNG by another name": 1}
    reasons = {entry["name"].rpartition("1")[2] and entry["reason"] for entry in train["bad"]}
    assert len(train["bad"]) == 3
    assert len(val["bad"]) == 1
    assert "empty file" in reasons
    assert any("truncated" in reason for reason in reasons)
    assert report["duplicates"][0][0].startswith("train") == report["duplicates"][0][1].startswith("val")
    for entry in [*train["bad"], *val["bad"]]:
        assert tells(printed, f"{entry['name']}", f"{entry['reason']}")
        assert entry["name"] in exclude.read_text().splitlines()

    data = ImageData(DataSettings(root=str(root), exclude=str(exclude), image_size=32, threads=1))
    assert (len(data.sources["train"]), len(data.sources["val"])) == (45, 17)
    world = World(0, 1, 0, torch.device("cpu"))
    plan = BatchPlan.make(images=45, global_batch=15, micro_batch=15, world_size=1)
    batches = data.train_batches(plan, AugmentSettings(randaugment=None, color_jitter=0.0), 0, world, 0)
    assert sum(len(next(batches).images) for _ in range(3)) == 45
    assert sum(len(batch.images) for batch in data.evaluation_batches(world)) == 17


@pytest.mark.run
def test_train_py_takes_the_exclude_list_that_many_processes_made(damaged, tmp_path):
    exclude = tmp_path / "exclude.txt"
    check = ("scripts/data/check_data.py", str(damaged), "--workers", "3", "--write-exclude", str(exclude))
    status, printed = run(*check, output=tmp_path / "checked")
    assert status == 1, printed
    command = small_run(damaged, tmp_path / "out", f"data.exclude={exclude}", "trainer.max_steps=1", *CROPS_ALONE)
    status, printed = run(*command, output=tmp_path / "trained")
    assert status == 0, printed
    assert tells(printed, "class", "6", "classes", "train", "45", "images", "val", "17", "4")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_clean_set_ends_with_status_0(image_root, check, tmp_path, layout):
    status, printed = check(write_layout(layout, image_root, tmp_path / "root"))
    assert status == 0, printed


def test_a_file_that_a_list_names_and_that_is_gone_is_bad(image_root, check, tmp_path):
    root = write_layout("list", image_root, tmp_path / "root")
    (root / "train" / "class_3_4.JPEG").unlink()
    status, printed = check(root)
    assert status == 1
    assert tells(printed, "train/class_3_4.JPEG")


def test_an_index_that_lies_in_its_middle_is_found(image_root, check, tmp_path):
    root = write_layout("shards", image_root, tmp_path / "root")
    classes = root / "train" / "train-002.classes"
    lines = classes.read_text().splitlines()
    middle = next(i for i in range(1, len(lines) - 1) if lines[i] != "0")
    classes.write_text("\n".join([*lines[:middle], "0", *lines[middle + 1 :]]) + "\n")
    status, printed = check(root)
    assert status == 2
    assert tells(printed, "train-002.classes")


def test_mistakes_end_with_status_2(check, tmp_path):
    status, printed = check(tmp_path / "nowhere")
    assert status == 2
    assert "nowhere" in printed


def test_what_training_does_not_read_is_counted_beside_the_bad(image_root, check, tmp_path):
    root, output = write_layout("folders", image_root, tmp_path / "root"), tmp_path / "report.json"
    for name in ("class_0/a.heic", "class_0/b.HEIC", "class_1/c.gif", "d.jpg"):
        (root / "train" / name).write_bytes(b"x")
    status, printed = check(root, "--output", output)
    assert status == 0
    splits = json.loads(output.read_text())["splits"]
    assert splits["train"]["not_read"] == {".heic": 2, ".gif": 1, ".jpg beside the class folders": 1}
    assert splits["val"]["not_read"] == {}
    assert re.search(r"not read *[│|] *4 *[│|] *0 ", printed)
    assert "2 .heic, 1 .gif" in printed


def test_images_are_named_whatever_they_are_called_and_whatever_the_terminal_knows(image_root, check, tmp_path):
    """Not UTF-8, a line's end, ASCII only; the exclude list is one that training reads."""
    root = write_layout("folders", image_root, tmp_path / "dés")
    exclude, output = tmp_path / "exclude.txt", tmp_path / "report.json"
    names = [b"caf\xe9.jpg", b"a\nbad: forged.jpg", "ü.jpg".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(root), b"train/class_0", name), "wb") as file:
            file.write(b"x" * 100)
    sys.stdout.reconfigure(encoding="ascii")
    status, printed = check(root, "--output", output, "--write-exclude", exclude, "--duplicates")
    assert status == 1
    assert len([line for line in printed.splitlines() if line.startswith("bad: ")]) == 3
    bad = [entry["name"] for entry in json.loads(output.read_text())["splits"]["train"]["bad"]]
    assert bad == [r"train/class_0/a\nbad: forged.jpg", r"train/class_0/caf\xe9.jpg", "train/class_0/ü.jpg"]
    assert len(ImageData(DataSettings(root=str(root), exclude=str(exclude))).sources["train"]) == 48

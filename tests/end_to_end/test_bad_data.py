"""Training and evaluating over images that cannot be decoded, by the commands."""

import json
import shutil

import pytest

from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import run_command, small_run
from tests.helpers.facts import tells

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def damaged_root(image_root, tmp_path_factory):
    """Two bad training images, one of them such that only DALI's decoder finds out, and one val image."""
    root = shutil.copytree(image_root, tmp_path_factory.mktemp("damaged") / "images")
    html = b"<html>404 not found</html>" * 50
    (root / "train" / "class_1" / "3.JPEG").write_bytes(html)
    (root / "train" / "class_4" / "0.JPEG").write_bytes(b"\x89PNG\r\n\x1a\n" + html)
    (root / "val" / "class_2" / "1.JPEG").write_bytes(html)
    return root


def test_a_run_over_bad_images_names_replaces_and_counts_them(damaged_root, tmp_path):
    done = run_command(*small_run(damaged_root, tmp_path))
    assert done.returncode == 0, done.stderr
    for name in ("train/class_1/3.JPEG", "train/class_4/0.JPEG", "val/class_2/1.JPEG"):
        assert done.stdout.count(f"the image {name} cannot be used") == 1
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(row.get("train/bad_images", 0) for row in rows) == 8  # two in each of four epochs
    evaluated = [row for row in rows if "val/top1" in row]
    assert [(row["val/images"], row["val/bad_images"]) for row in evaluated] == [(18, 1)] * 4

    done = run_command("evaluate.py", f"checkpoint={tmp_path}/run", "device=cpu")
    assert tells(done.stdout, "bad", "1")
    assert json.loads((tmp_path / "run" / "checkpoints" / "evaluation.json").read_text())["bad_images"] == 1
    done = run_command("evaluate.py", f"checkpoint={tmp_path}/run", "device=cpu", "data.on_bad_image=stop")
    assert done.returncode == 2
    assert tells(done.stderr, "error", "val/class_2/1.JPEG")


def test_too_many_bad_images_end_a_run_with_the_name_and_what_to_do(damaged_root, tmp_path):
    done = run_command(*small_run(damaged_root, tmp_path, "data.max_bad_images=1", "data.loader=torch"))
    assert done.returncode == 2
    assert tells(done.stderr, "data.max_bad_images=1", "images")
    assert "scripts/data/check_data.py ROOT --write-exclude FILE" in done.stderr

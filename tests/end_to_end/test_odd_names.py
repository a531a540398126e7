"""Classes and images of any name, through training, evaluation and prediction by the real commands."""

import csv
import json
import os
import shutil

import pytest

from tests.conftest import small_run
from tests.helpers.quick_start import run

pytestmark = pytest.mark.run

ASCII = dict(PYTHONIOENCODING="ascii")


def test_names_that_are_not_utf_8_go_through_every_command(image_root, tmp_path):
    """Bytes of Latin-1, as an old archive leaves them, and control characters; to a terminal that knows ASCII only."""
    root = shutil.copytree(image_root, tmp_path / "bilder-für-alle")
    for split in ("train", "val"):
        (root / split / "class_1" / "0.JPEG").rename(root / split / "class_1" / os.fsdecode(b"\xff.JPEG"))
        (root / split / "class_1").rename(root / split / os.fsdecode(b"caf\xe9"))
        (root / split / "class_3").rename(root / split / "=1\x1b[31m\nerror: forged")
    (root / "val" / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.JPEG")).write_bytes(b"")  # bad, so it is named
    files = {name: tmp_path / f"{name}.csv" for name in ("predictions", "per_class", "predicted")}

    train = small_run(image_root, tmp_path, f"data.root='{root}'", "trainer.max_steps=2")
    status, trained = run(*train, output=tmp_path / "1", **ASCII)
    assert status == 0, trained
    evaluate = ("evaluate.py", f"checkpoint={tmp_path}/run", "device=cpu", "weights=raw")
    asked = [f"{name}={files[name]}" for name in ("predictions", "per_class")]
    status, evaluated = run(*evaluate, *asked, output=tmp_path / "2", **ASCII)
    assert status == 0, evaluated
    predict = ("scripts/model/predict.py", f"{root}/val", "--checkpoint", f"{tmp_path}/run", "--weights", "raw")
    status, predicted = run(*predict, "--output", str(files["predicted"]), output=tmp_path / "3", **ASCII)
    assert status == 1, predicted  # for the bad image

    rows = {}
    for name, path in files.items():
        with path.open(newline="", encoding="utf-8") as file:
            rows[name] = list(csv.DictReader(file))
    classes = {r"caf\xe9", r"'=1\x1b[31m\nerror: forged", *(f"class_{c}" for c in (0, 2, 4, 5))}
    assert {row["class"] for row in rows["per_class"]} == classes
    assert {row["target"] for row in rows["predictions"]} == classes
    assert len(rows["predicted"]) == 17
    assert json.loads((tmp_path / "run" / "checkpoints" / "evaluation.json").read_text())["bad_images"] == 1
    assert r"bilder-f\xfcr-alle: class folders, 6 classes, train 48 images" in trained
    for printed in (trained, evaluated, predicted):
        assert r"val/caf\xe9/\xff.JPEG" in printed
        assert "\x1b[31m" not in printed
        assert not any(line.startswith("error: forged") for line in printed.splitlines())

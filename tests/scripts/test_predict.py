"""Predictions by the command, on photographs."""

import csv

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from tests.conftest import run_command
from tests.scripts.run_folders import CLASSES, SIZE, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, write_run(folder, class_counts=[6, 4, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for name, photo in (("a.jpg", photos[0]), ("more/$b$.png", photos[1]), ("c.webp", photos[1][:, ::-1])):
        Image.fromarray(photo).save(folder / name)
    return folder


def predict(*arguments):
    return run_command("scripts/predict.py", *map(str, arguments))


def expected(model, path):
    transform = create_transform((3, SIZE, SIZE), crop_pct=0.875, interpolation="bicubic")
    with torch.no_grad():
        return model(transform(Image.open(path).convert("RGB"))[None])[0].softmax(dim=0)


def test_an_image_gives_classes_shortlists_and_a_picture(run, folder, tmp_path):
    output = tmp_path / "out.png"
    done = predict(folder / "more" / "$b$.png", "--checkpoint", run[0], "--output", output)
    assert done.returncode == 0, done.stderr
    best = expected(run[1], folder / "more" / "$b$.png")
    assert f"{100 * best.max():.2f} %" in done.stdout
    for stage, kept in ((1, 6), (2, 4), (3, 2)):
        assert f"after stage {stage}: {kept} of 12 classes: " in done.stdout
    with Image.open(output) as picture:
        assert picture.width > 1000


def test_a_folder_gives_a_row_per_image_and_names_the_unreadable(run, folder, tmp_path):
    (folder / "half.jpg").write_bytes((folder / "a.jpg").read_bytes()[:5000])
    (folder / "none.png").write_bytes(b"")
    output = tmp_path / "out.csv"
    done = predict(folder, "--checkpoint", run[0], "--output", output, "--batch-size", 2)
    assert done.returncode == 1
    assert "half.jpg" in done.stderr
    assert "none.png" in done.stderr
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(folder / name) for name in ("a.jpg", "c.webp", "more/$b$.png")]
    for row in rows:
        probabilities = expected(run[1], row["image"])
        assert row["class1"] == CLASSES[probabilities.argmax()]
        for rank in range(1, 6):
            assert float(row[f"probability{rank}"]) == pytest.approx(
                probabilities.sort().values[-rank].item(), abs=1e-4
            )


def test_a_folder_without_images_is_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    done = predict(tmp_path / "empty", "--checkpoint", tmp_path)
    assert done.returncode == 2
    assert "fix: give an image or a folder" in done.stderr


def test_a_model_without_stages_predicts_too(folder, tmp_path):
    write_run(tmp_path, "convnext_atto")
    done = predict(folder / "a.jpg", "--checkpoint", tmp_path, "--output", tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert "after stage" not in done.stdout

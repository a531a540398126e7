"""Predictions by the command, on photographs."""

import csv
import os
import sys

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from contextual_cnn.errors import run_script
from scripts.model import predict as script
from tests.helpers.facts import tells
from tests.helpers.malformed import resized
from tests.helpers.run_folders import CLASSES, SIZE, write_run


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


@pytest.fixture
def predict(monkeypatch, capfd):
    """Runs the script's main in this process; returns exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_script(script.main)
        return stopped.value.code, *capfd.readouterr()

    return run


def expected(model, path):
    transform = create_transform((3, SIZE, SIZE), crop_pct=0.875, interpolation="bicubic")
    with torch.no_grad():
        return model(transform(Image.open(path).convert("RGB"))[None])[0].softmax(dim=0)


def test_an_image_gives_classes_shortlists_and_a_picture(predict, run, folder, tmp_path):
    output = tmp_path / "out.png"
    status, printed, errors = predict(folder / "more" / "$b$.png", "--checkpoint", run[0], "--output", output)
    assert status == 0, errors
    best = expected(run[1], folder / "more" / "$b$.png")
    assert tells(printed, f"{100 * best.max():.2f}")
    for stage, kept in ((1, 6), (2, 4), (3, 2)):
        assert tells(printed, "stage", f"{stage}", f"{kept}", "12", "classes")
    with Image.open(output) as picture:
        assert picture.width > 1000


def test_a_folder_gives_a_row_per_image_and_names_the_unreadable(predict, run, folder, tmp_path):
    (folder / "half.jpg").write_bytes((folder / "a.jpg").read_bytes()[:5000])
    (folder / "none.png").write_bytes(b"")
    (folder / "bomb.jpg").write_bytes(resized((folder / "a.jpg").read_bytes(), 30_000, 30_000))
    output = tmp_path / "out.csv"
    status, _, errors = predict(folder, "--checkpoint", run[0], "--output", output, "--batch-size", 2)
    assert status == 1
    assert "half.jpg" in errors
    assert "none.png" in errors
    assert "bomb.jpg" in errors
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


def test_a_folder_without_images_is_explained(predict, run, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, errors = predict(tmp_path / "empty", "--checkpoint", run[0])
    assert status == 2
    assert "fix: " in errors


def test_a_model_without_stages_predicts_too(predict, folder, tmp_path):
    write_run(tmp_path, "convnext_atto")
    status, printed, errors = predict(folder / "a.jpg", "--checkpoint", tmp_path, "--output", tmp_path / "out.png")
    assert status == 0, errors
    assert "after stage" not in printed


def test_a_gif_is_predicted_and_postscript_is_not_opened(predict, run, photos, postscript, tmp_path):
    picture, note = postscript
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(picture)
    Image.fromarray(photos[0]).convert("P").save(tmp_path / "in" / "b.gif")
    status, _, errors = predict(tmp_path / "in", "--checkpoint", run[0], "--output", tmp_path / "out.csv")
    assert status == 1
    assert "a.jpg" in errors
    assert not note.exists()
    with (tmp_path / "out.csv").open() as file:
        assert [row["image"] for row in csv.DictReader(file)] == [str(tmp_path / "in" / "b.gif")]
    assert predict(tmp_path / "in" / "a.jpg", "--checkpoint", run[0], "--output", tmp_path / "out.png")[0] == 1
    assert not note.exists()


@pytest.fixture
def odd_names(folder, tmp_path):
    """A folder of files whose names are not UTF-8, hold control characters, or are a spreadsheet's formula."""
    photo = (folder / "a.jpg").read_bytes()
    names = {b"caf\xe9.jpg": photo, b"bad\x1b[31m\nforged line.jpg": b"", "é.png".encode(): photo, b"=1+1.jpg": photo}
    for name, content in names.items():
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(content)
    return tmp_path


def test_whatever_a_file_is_called_its_row_is_written_and_no_line_forged(predict, run, odd_names, monkeypatch):
    monkeypatch.chdir(odd_names)
    status, _, errors = predict(".", "--checkpoint", run[0], "--output", "out.csv")
    assert status == 1
    assert [line.startswith("skipped") for line in errors.splitlines() if "forged" in line] == [True]
    assert "\x1b" not in errors
    with open("out.csv", encoding="utf-8") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["'=1+1.jpg", r"caf\xe9.jpg", "é.png"]


def test_a_terminal_that_knows_ascii_only_shows_escapes(predict, run, odd_names):
    sys.stdout.reconfigure(encoding="ascii")
    status, printed, _ = predict(odd_names / "é.png", "--checkpoint", run[0], "--output", odd_names / "ü.png")
    assert status == 0
    assert r"\xfc.png" in printed

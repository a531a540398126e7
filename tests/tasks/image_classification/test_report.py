"""Which file a report belongs into: that of the run's own whole val split is replaced by nothing else."""

import json
from dataclasses import replace

import pytest

from contextual_cnn.settings.data import DataSettings
from contextual_cnn.tasks.image_classification.report import differing_data, write_report
from tests.helpers.facts import tells

OWN = DataSettings(root="/data/imagenet")
OTHER = {
    "root": "/data/imagenet-a",
    "layout": "benchmark",
    "exclude": "bad.txt",
    "limit": 200,
    "image_size": 288,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "loader": "synthetic",
}


@pytest.mark.parametrize("key", OTHER)
def test_whatever_makes_other_images_has_a_file_of_its_own(key, tmp_path):
    differences = differing_data(OWN, replace(OWN, **{key: OTHER[key]}))
    assert list(differences) == [key]
    write_report(tmp_path, {"top1": 90.0, "differences": {}})
    write_report(tmp_path, {"top1": 10.0, "differences": differences})
    whole, other = sorted(tmp_path.iterdir(), key=lambda path: len(path.name))
    assert whole.name == "evaluation.json"
    assert json.loads(whole.read_text())["top1"] == 90.0
    assert json.loads(other.read_text())["differences"] == differences


def test_another_way_to_the_same_images_is_no_difference(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    same = {"root": f"{tmp_path}/images", "loader": "torch", "threads": 4, "eval_batch_size": 1}
    assert differing_data(replace(OWN, root="images"), replace(OWN, **same)) == {}
    assert differing_data(replace(OWN, loader="synthetic"), OWN) == {}  # evaluated on the images all the same


def test_a_file_is_found_by_what_differs_and_by_nothing_else(tmp_path):
    """Folders of the same name, and names that no file system takes."""
    awkward = "/x/" + "é\n/".join("ab" * 100 for _ in range(3))
    for root in ("/a/val", "/b/val", "/b/val", awkward):
        write_report(tmp_path, {"differences": differing_data(OWN, replace(OWN, root=root, limit=7))})
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 3
    assert sum(name.startswith("evaluation_root-val_limit-7_") for name in names) == 2
    assert all(name.isascii() and name.isprintable() for name in names)


def test_a_folder_that_cannot_be_written_costs_the_file_alone(tmp_path, capsys):
    write_report(tmp_path / "gone", {"differences": {}})
    assert tells(capsys.readouterr().out, "evaluation.json")

"""What a checkpoint tells of the data that its model is to be fed."""

import pytest

from contextual_cnn.runs.checkpoint import load_checkpoint, write_checkpoint
from contextual_cnn.trained import load_model
from tests.helpers.run_folders import SIZE, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


def trained_with(run, tmp_path, **data):
    """A checkpoint of the same model whose run had other data keys."""
    state = load_checkpoint(run / "checkpoints" / "best.pt")
    state["config"]["data"] |= data
    write_checkpoint(state, tmp_path / "other.pt")
    return str(tmp_path / "other.pt")


def test_images_are_made_as_the_run_made_them(run, tmp_path):
    other = trained_with(run, tmp_path, interpolation="bilinear", mean=[0.5, 0.5, 0.5], crop_pct=0.9)
    expected = {"input_size": (3, SIZE, SIZE), "crop_pct": 0.9, "interpolation": "bilinear"}
    assert load_model(other).transform == expected | {"mean": (0.5, 0.5, 0.5), "std": (0.229, 0.224, 0.225)}
    assert load_model(other, data={"interpolation": "bicubic"}).transform["interpolation"] == "bicubic"


def test_a_checkpoint_from_before_data_interpolation_is_bicubic(run):
    assert "interpolation" not in load_checkpoint(run / "checkpoints" / "best.pt")["config"]["data"]
    assert load_model(str(run)).transform["interpolation"] == "bicubic"


@pytest.mark.parametrize(
    ("own", "overrides", "loader", "layout"),
    [
        ({"loader": "synthetic"}, {}, "dali", "auto"),
        ({"loader": "synthetic"}, {"loader": "synthetic"}, "synthetic", "auto"),
        ({"loader": "torch"}, {}, "torch", "auto"),
        ({"layout": "synthetic"}, {}, "dali", "synthetic"),  # there is nothing else
        ({"layout": "synthetic"}, {"root": "/data"}, "dali", "auto"),
        ({"layout": "synthetic"}, {"root": "/data", "layout": "synthetic"}, "dali", "synthetic"),
    ],
)
def test_noise_is_not_inherited(run, tmp_path, own, overrides, loader, layout):
    given = load_model(trained_with(run, tmp_path, **{"loader": "dali", "layout": "auto"} | own), data=overrides)
    assert (given.data.loader, given.data.layout) == (loader, layout)
    assert all(getattr(given.own_data, key) == value for key, value in own.items())

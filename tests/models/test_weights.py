"""model.weights takes a run of our own as well as a file of others, and of a run the weights that were its best."""

import logging

import pytest
import torch

from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.runs.checkpoint import DamagedCheckpoint
from contextual_cnn.settings.model import ModelSettings
from tests.helpers.facts import tells
from tests.helpers.hostile import write_whole
from tests.helpers.run_folders import write_run

TINY = dict(name="contextual_convnext_atto", timm_options={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]})


@pytest.fixture
def run(tmp_path):
    """A run folder and the checkpoint in it, best by its average."""
    write_run(tmp_path / "run", **TINY)
    path = tmp_path / "run" / "checkpoints" / "best.pt"
    state = torch.load(path, weights_only=True)
    state["ema"] = {name: tensor + 1 for name, tensor in state["model"].items()}
    state["best"]["weights"] = "ema"
    write_whole(state, path)
    return path, state


def loaded(weights, num_classes=12, **changes):
    return build_model(ModelSettings(**TINY | changes, num_classes=num_classes, weights=str(weights))).state_dict()


def test_a_run_gives_the_weights_that_made_it_the_best(run, caplog):
    path, state = run
    for given in (path, path.parent, path.parent.parent):
        with caplog.at_level(logging.INFO):
            found = loaded(given)
        assert all(torch.equal(tensor, state["ema"][name]) for name, tensor in found.items())
        assert tells(caplog.text, f"{path}", "step", "7")
        caplog.clear()
    state["best"]["weights"] = "raw"
    found = loaded(write_whole(state, path))
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in found.items())


def test_a_run_without_an_average_gives_the_raw_weights(run):
    path, state = run
    found = loaded(write_whole(state | {"ema": None}, path))
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in found.items())


def test_other_classes_keep_all_but_the_table_of_classes(run):
    path, state = run
    found = loaded(path, num_classes=7)
    same = [name for name, tensor in found.items() if tensor.shape == state["ema"][name].shape]
    assert set(found) - set(same) == {"class_embeddings.weight"}
    assert all(torch.equal(found[name], state["ema"][name]) for name in same)


def test_a_damaged_run_is_told_from_weights_of_others(run):
    path, state = run
    content = path.read_bytes()
    for damaged in (
        content[:-300] + b"x" + content[-299:],
        content[:-1],
        content[: len(content) // 2] + content[-200:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpoint, match=r"best\.pt"):
            loaded(path)
    torch.save(state | {"format": 2}, path)  # written again by somebody, raw and averaged weights side by side
    with pytest.raises(DamagedCheckpoint, match="manifest"):
        loaded(path)
    path.unlink()
    with pytest.raises(UserError, match=r"model\.weights"):
        loaded(path.parent.parent)


def test_weights_of_another_run_that_do_not_fit_are_refused(run):
    path, _ = run
    with pytest.raises(UserError, match=r"model\.weights.*best\.pt"):
        loaded(path, timm_options={"depths": [1, 1, 1, 2], "dims": [8, 16, 24, 32]})

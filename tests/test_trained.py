"""A trained model from a file that came from elsewhere: whatever is in it, an answer and no harm."""

import logging
import resource
from pathlib import Path

import pytest
import torch

from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.trained import load_model
from tests.helpers.hostile import write_whole
from tests.helpers.quick_start import run
from tests.helpers.run_folders import write_run

TINY = dict(timm_options={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, **TINY)
    return folder


@pytest.fixture
def state(folder) -> dict:
    """A checkpoint, to be changed."""
    return torch.load(folder / "checkpoints" / "best.pt", weights_only=True)


def averaged(state):
    return {name: tensor + 1 for name, tensor in state["model"].items()}


def test_the_weights_are_those_of_the_best_and_a_missing_average_is_no_reason_to_stop(state, tmp_path):
    state["best"]["weights"] = "ema"
    assert load_model(write_whole(state, tmp_path / "x.pt")).weights == "raw"
    with pytest.raises(UserError, match="moving average"):
        load_model(tmp_path / "x.pt", "ema")
    state["ema"] = averaged(state)
    for wanted, part in (("auto", "ema"), ("raw", "model"), ("ema", "ema")):
        trained = load_model(write_whole(state, tmp_path / "x.pt"), wanted)
        assert all(torch.equal(tensor, state[part][name]) for name, tensor in trained.model.state_dict().items())


def without(entry):
    return lambda state: state.pop(entry)


def model(**changes):
    return lambda state: state["config"]["model"].update(changes)


def tensors(**changes):
    return lambda state: state["model"].update({name.replace("__", "."): tensor for name, tensor in changes.items()})


def many_classes(state):
    """Paid for in the file by names alone."""
    state["classes"] = ["x"] * 10**5
    state["config"]["model"]["num_classes"] = 10**5


REFUSED = {
    **{f"no {entry}": without(entry) for entry in ("model", "ema", "config", "classes", "best", "step", "format")},
    "no group model": lambda state: state["config"].pop("model"),
    "no group data": lambda state: state["config"].pop("data"),
    "no model.name": lambda state: state["config"]["model"].pop("name"),
    "no data.root": lambda state: state["config"]["data"].pop("root"),
    "group model a text": lambda state: state["config"].update(model="x"),
    "unknown key": model(_target_="os.system"),
    "key with a control character": model(**{"\x1b[31m": 1}),
    "class_counts keys": model(class_counts={"0": 6}),
    "contextual_every 0": model(contextual_every=0),
    "contextual_stages": model(contextual_stages=[7]),
    "layer_scale nan": model(layer_scale=float("nan")),
    "another model": model(name="resnet18", timm_options=None),
    "unknown model": model(name="nothing"),
    "a tag": model(name="resnet18.a1_in1k", timm_options=None),
    "other number of classes": model(num_classes=11),
    "ten million classes": model(num_classes=10**7),
    "a hundred thousand classes": many_classes,
    "embeddings of a million": model(embedding_dim=10**6),
    "embeddings of 60000": model(embedding_dim=60000),
    "a million wide": model(timm_options={"depths": [1, 1, 1, 1], "dims": [10**6] * 4}),
    "16000 wide": model(timm_options={"depths": [1, 1, 1, 1], "dims": [16000] * 4}),
    "a billion deep": model(timm_options={"depths": [10**9, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    "16000 deep": model(timm_options={"depths": [16000] * 4, "dims": [8, 16, 24, 32]}),
    "negative depth": model(timm_options={"depths": [-1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    "a dimension of 0": model(timm_options={"depths": [1, 1, 1, 1], "dims": [8, 16, 0, 32]}),
    "missing tensor": lambda state: state["model"].pop("class_embeddings.weight"),
    "tensor too many": tensors(unknown=torch.ones(1)),
    "tensor of another shape": tensors(class_embeddings__weight=torch.ones(3, 4)),
    "tensor of another type": tensors(class_embeddings__weight=torch.ones(12, 256, dtype=torch.complex64)),
    "tensor of one number": tensors(class_embeddings__weight=torch.ones(1).expand(10**9, 256)),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_together_is_refused_before_anything_is_allocated(change, state, tmp_path):
    change(state)
    path = write_whole(state, tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as refused:
        load_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB
    assert str(refused.value).count("\n") == 1  # nothing in the file makes a line of its own
    assert "\x1b" not in str(refused.value)


@pytest.mark.run
@pytest.mark.parametrize(
    "command",
    [
        ["evaluate.py", "checkpoint=FILE"],
        ["scripts/model/predict.py", "photo.jpg", "--checkpoint", "FILE"],
        ["scripts/model/export.py", "--checkpoint", "FILE", "--format", "timm"],
        ["scripts/analysis/analyze.py", "shortlist", "--checkpoint", "FILE"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_answers_in_order(command, state, tmp_path):
    state["config"]["model"].update(embedding_dim=128)
    path = write_whole(state, tmp_path / "x.pt")
    (tmp_path / "photo.jpg").touch()
    command = [argument.replace("FILE", str(path)) for argument in command]
    status, printed = run(*command, output=tmp_path / "output", folder=tmp_path)
    assert (status, "Traceback" in printed) == (2, False), printed
    assert "x.pt" in printed.splitlines()[0]


def test_an_evaluated_checkpoints_paths_are_not_followed(state, tmp_path, caplog):
    """model.weights in its config is a path on the machine where it was trained, or what somebody wrote there."""
    other = write_whole(state | {"model": averaged(state)}, tmp_path / "other.pt")
    state["config"]["model"]["weights"] = str(other)
    with caplog.at_level(logging.INFO):
        trained = load_model(write_whole(state, tmp_path / "x.pt"))
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in trained.model.state_dict().items())
    assert "other.pt" not in caplog.text


def test_an_unusual_size_of_our_own_is_no_suspicion(tmp_path):
    """What training takes, evaluation takes."""
    options = dict(timm_options={"depths": [2, 1, 9, 1], "dims": [8, 8, 8, 8], "patch_size": 2}, embedding_dim=24)
    write_run(tmp_path, **options)
    loaded = load_model(tmp_path).model
    built = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=12, **options))
    assert [(name, t.shape) for name, t in loaded.state_dict().items()] == [
        (name, t.shape) for name, t in built.state_dict().items()
    ]

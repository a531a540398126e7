"""Round trips: a checkpoint, exported, is read by timm, torch.export and onnxruntime, and predicts the same."""

import json
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import contextual_cnn.models  # noqa: F401 - registers them
from contextual_cnn.runs.checkpoint import write_checkpoint
from tests.conftest import run_command
from tests.helpers.facts import tells
from tests.helpers.run_folders import CLASSES, SIZE, write_run
from tests.helpers.small_models import small

pytestmark = pytest.mark.run


def images(batch):
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = dict(mask=True, class_counts=[6, 4, 2], timm_options=small("convnext_atto"))
    return folder, write_run(folder, **options)


def export(folder, kind):
    done = run_command("scripts/model/export.py", "--checkpoint", str(folder), "--format", kind)
    assert done.returncode == 0, done.stderr
    assert "largest difference of the logits" in done.stdout
    return folder / "export" / kind


def test_timm_reads_the_folder(run):
    folder, model = run
    exported = export(folder, "timm")
    config = json.loads((exported / "config.json").read_text())
    assert config["label_names"] == list(CLASSES)
    assert config["label_descriptions"]["n01440764"].startswith("tench")
    again = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    by_file = timm.create_model(
        config["architecture"], checkpoint_path=exported / "model.safetensors", **config["model_args"]
    )
    with torch.no_grad():
        expected = model(images(2))
        assert torch.equal(again(images(2)), expected)
        assert torch.equal(by_file.eval()(images(2)), expected)
        maps = timm.create_model(f"local-dir:{exported}", pretrained=True, features_only=True).eval()(images(2))
        assert torch.equal(maps[-1], model.forward_features(images(2)))
    data = timm.data.resolve_data_config({}, model=again)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, SIZE, SIZE), 0.875, "bicubic")


def test_a_torch_program_runs_without_this_package(run, tmp_path):
    folder, model = run
    program = export(folder, "torch_export") / "model.pt2"
    x = images(5)
    torch.save(x, tmp_path / "images.pt")
    code = (
        "import sys, torch;"
        "y = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2]));"
        "assert 'contextual_cnn' not in sys.modules and 'torchvision' not in sys.modules;"
        "torch.save(y, sys.argv[3])"
    )
    files = [str(program), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=tmp_path)
    with torch.no_grad():
        assert_close(torch.load(tmp_path / "logits.pt"), model(x), rtol=0, atol=1e-4)


def test_onnxruntime_runs_any_batch(run):
    folder, model = run
    session = onnxruntime.InferenceSession(export(folder, "onnx") / "model.onnx")
    for batch in (1, 4):
        with torch.no_grad():
            expected = model(images(batch))
        (logits,) = session.run(None, {"images": images(batch).numpy()})
        assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
        assert (logits.argmax(axis=1) == expected.argmax(dim=1).numpy()).all()


def test_several_checkpoints_become_their_mean(run, tmp_path):
    folder, model = run
    state = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    state["model"] = {name: 3 * tensor for name, tensor in state["model"].items()}
    write_checkpoint(state, tmp_path / "other.pt")
    command = ["--checkpoint", str(folder), str(tmp_path / "other.pt"), "--format", "timm", "--output", str(tmp_path)]
    done = run_command("scripts/model/export.py", *command)
    assert done.returncode == 0, done.stderr
    assert tells(done.stdout, "2", "checkpoints")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert_close(tensor, 2 * model.state_dict()[name])


def test_what_cannot_be_exported_says_so(tmp_path):
    write_run(tmp_path, convolution="weight_offsets")
    done = run_command("scripts/model/export.py", "--checkpoint", str(tmp_path), "--format", "onnx")
    assert done.returncode == 2
    assert "weight_offsets" in done.stderr
    assert "fix: --format timm" in done.stderr

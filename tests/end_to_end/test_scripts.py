"""The scripts that measure: small, but the real thing, from the command line to the JSON."""

import json
import signal
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from contextual_cnn.analysis.comparison import describe_family
from contextual_cnn.models import contextual_conv
from tests.conftest import HAS_COMPILER, run_command, run_python
from tests.helpers import quick_start
from tests.helpers.fake_cuda import run_under_autocast

pytestmark = pytest.mark.run


def run(*command, **options) -> tuple[list[dict], dict]:
    """The results that a script printed one by one, and the report in its file, which is the last that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_command(*command, "--output", f"{folder}/deep/report.json", **options)
        assert done.returncode == 0, done.stderr
        text = Path(folder, "deep", "report.json").read_text()
    assert done.stdout.endswith(text)
    return lines(done.stdout.removesuffix(text)), json.loads(text)


def report(*command, **options) -> dict:
    return run(*command, **options)[1]


def lines(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_a_benchmark_that_is_killed_leaves_what_it_had(tmp_path):
    output = tmp_path / "report.json"
    size = ("--batch-size", "1", "--rounds", "1", "--output", str(output))
    running = quick_start.Command("scripts/dev/benchmark.py", "op", *size, output=tmp_path / "printed")
    running.wait_until(lambda: output.exists() and "forward" in str(json.loads(output.read_text())["results"]))
    running.send(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    left = json.loads(output.read_text())
    assert left["incomplete"]
    found = {(stage, what): result for stage, of in left["results"].items() for what, result in of.items()}
    assert found["stage 2", "forward"]["milliseconds"]["contextual"] > 0
    assert ("stage 4", "kept_for_backward_over_input") not in found
    printed = [line for each in lines(running.printed) for line in each.items()]
    assert printed[: len(found)] == [(" / ".join(place), result) for place, result in found.items()]


def test_the_gpu_check_goes_on_where_a_part_fails_or_hangs(monkeypatch, tmp_path):
    """Of its processes there is a stand-in here: the first dies, the second hangs after one result."""
    import gpu_check

    stand_in = tmp_path / "python"
    stand_in.write_text(
        "#!/usr/bin/env bash\n"
        """echo '{"check": 1}'\n"""
        '[[ "$*" != *"--part correct "* ]] || exit 3\n'
        '[[ "$*" != *"--part kernels "* ]] || exec sleep 1000\n'
    )
    stand_in.chmod(0o755)
    output = tmp_path / "report.json"
    monkeypatch.setattr(gpu_check.sys, "executable", str(stand_in))
    parts = ("--parts", "correct", "steps", "kernels", "depthwise")
    monkeypatch.setattr(
        "sys.argv", ["gpu_check.py", *parts, "--device", "cpu", "--budget", "3", "--output", str(output)]
    )
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1
    found = json.loads(output.read_text())
    assert not found["passed"]
    one = {"check": 1}
    correct, steps, kernels, depthwise = (
        [{k: v for k, v in check.items() if k != "part"} for check in found["checks"] if check["part"] == part]
        for part in parts[1:]
    )
    assert correct == [one, {"passed": False, "error": "the part ended with status 3"}]
    assert steps == [one]
    assert kernels[0] == one
    assert "budget" in kernels[1]["incomplete"]
    assert depthwise == [{"left_out": "the budget is spent"}]


def test_the_benchmark_of_the_convolution_gives_it_the_types_that_the_model_does(monkeypatch):
    """On a GPU: bfloat16 maps, float32 positions."""
    from scripts.dev import benchmark

    given = []
    real = contextual_conv.contextual_conv2d

    def noted(x, weight, bias, **options):
        tensors = {"x": x, "weight": weight, "bias": bias} | options
        given.append({name: t.dtype for name, t in tensors.items() if isinstance(t, torch.Tensor)})
        return real(x, weight, bias, **options)

    monkeypatch.setattr(contextual_conv, "contextual_conv2d", noted)
    with torch.device("meta"):
        model = timm.create_model("contextual_convnext_tiny")
    run_under_autocast(model)
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            arguments = Namespace(batch_size=2, device=device, dtype=benchmark.default_dtype(device))
            timed = {name: t.dtype for name, t in benchmark.layer_tensors(192, 28, arguments).items()}
            assert timed["x"] == (torch.float32 if device == "cpu" else torch.bfloat16)
    assert given == [timed] * 5


def test_the_benchmark_of_a_model_times_it_beside_its_twin_and_the_released_formulation():
    size = ("--model", "atto", "--image-size", "32", "--batch-size", "2", "--rounds", "1")
    found = report("scripts/dev/benchmark.py", "model", *size, "--released")["results"]
    for what in ("training step", "inference"):
        assert set(found[what]["milliseconds"]) == {"contextual_convnext_atto", "convnext_atto", "as released"}
        assert min(found[what]["milliseconds"].values()) > 0


def test_the_benchmark_of_clips_has_a_twin():
    found = report("scripts/dev/benchmark.py", "clips", "--image-size", "32", "--rounds", "1")["results"]
    for what in ("training step", "inference"):
        assert set(found[what]["clips_per_second"]) == {"contextual_resnet50", "resnet50"}
        assert min(found[what]["clips_per_second"].values()) > 0


def test_table_1_has_the_twin_and_the_contextual_model_side_by_side():
    size = ("--model", "atto", "--image-size", "32", "--batch-size", "2", "--rounds", "1")
    rows = report("scripts/dev/benchmark.py", "table1", *size)["results"]
    assert [row["model"] for row in rows] == ["convnext_atto", "contextual_convnext_atto"]
    assert rows[0]["macs"] < rows[1]["macs"]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_the_benchmark_of_the_loss_times_both_kinds_of_targets():
    found = report("scripts/dev/benchmark.py", "loss", "--batch-size", "2", "--rounds", "1")["results"]
    assert set(found["milliseconds"]) == {"soft targets", "hard targets"}


@pytest.mark.parametrize(
    "command",
    [["scripts/dev/benchmark.py", "loss", "--batch-size", "2", "--rounds", "1"], ["scripts/dev/gpu_check.py", "-h"]],
)
def test_what_runs_on_a_lent_gpu_needs_no_more_than_torch_triton_and_timm(command):
    """gpu_check.py is for machines that have been set up for nothing else."""
    absent = ["hydra", "omegaconf", "wandb", "nvidia.dali", "rich", "matplotlib", "sklearn"]
    program = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({absent}); sys.argv = {command}; "
        "sys.path.insert(0, 'scripts/dev'); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
def test_the_gpu_check_passes_on_a_cpu():
    """Among others: inductor compiles the whole model without a graph break, and its gradients are the plain ones."""
    printed, found = run("scripts/dev/gpu_check.py", "--device", "cpu", "--quick", timeout=580)
    assert printed == found["checks"]
    assert found["passed"]
    names = {check["check"] for check in found["checks"] if "check" in check}
    assert {"small, bfloat16, offsets of 1 pixels", "compiles whole, training", "compiles whole, evaluation"} <= names
    ratios = [value for check in found["checks"] for key, value in check.items() if key.startswith("over ")]
    assert len(ratios) == 3
    assert ratios[0] == 1
    assert {check["part"] for check in found["checks"]} == {
        "correct",
        "steps",
        "kernels",
        "depthwise",
        "compiled",
        "chain",
    }


def test_the_kernels_can_be_tuned():
    printed, found = run(
        "scripts/dev/tune_kernels.py", *("--device", "cpu", "--quick", "--rounds", "1", "--batch-size", "1"),
        TRITON_INTERPRET="1",
    )  # fmt: skip
    (layer,) = found["milliseconds"].values()
    assert [line["kernel"] for line in printed] == list(layer)
    assert set(layer) == {
        *("forward", "weights and offsets", "gradient of x", "depthwise", "depthwise, gradient of w"),
    }
    assert all(time > 0 for choices in layer.values() for time in choices.values())


def test_the_table_of_costs_keeps_apart_what_papers_count_and_what_they_do_not():
    from scripts.model import describe_model

    twin, contextual = rows = describe_family("convnext_atto")
    columns = {column.header: list(column.cells) for column in describe_model.table(rows, 224).columns}
    added = {
        "vs twin": contextual["macs"] - twin["macs"],
        "bilinear samples": contextual["interpolation"],
        "class table": contextual["per_batch"],
    }
    for name, macs in added.items():
        assert float(columns[name][-1].rstrip(" %")) == pytest.approx(100 * macs / twin["macs"], abs=0.051), name


def test_the_preview_is_a_picture_of_labelled_rows(image_root, tmp_path):
    output = tmp_path / "preview.png"
    size = ("--columns", "4", "--rows", "1", "--image-size", "32")
    done = run_command("scripts/data/preview_data.py", str(image_root), "--output", str(output), *size)
    assert done.returncode == 0, done.stderr
    with Image.open(output) as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        assert sheet.width > 4 * 32
        assert sheet.height > 5 * 32  # image, ours, timm's, and two of ours that are mixed
        assert len(sheet.getcolors(sheet.width * sheet.height)) > 1000
    done = run_command("scripts/data/preview_data.py", str(image_root), "--output", str(tmp_path / "no.such"), *size)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_the_comparison_of_the_loaders_has_nine_distances():
    found = report("scripts/dev/compare_loaders.py", "--images", "96", "--image-size", "32", "--loader", "torch")
    assert found["images"] == 96
    assert len(found["results"]) == 9
    assert found["below_the_line"] >= 7  # each of them is above by chance once in twenty times

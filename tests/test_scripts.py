"""The scripts that measure: small, but the real thing, from the command line to the JSON."""

import json

import pytest
from PIL import Image

from tests.conftest import HAS_COMPILER, run_command, run_python


def report(*command, **options):
    done = run_command(*command, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_benchmark_of_a_model_times_it_beside_its_twin_and_the_released_formulation():
    size = ("--model", "atto", "--image-size", "32", "--batch-size", "2", "--rounds", "1")
    found = report("scripts/benchmark.py", "model", *size, "--released")["results"]
    for what in ("training step", "inference"):
        assert set(found[what]["milliseconds"]) == {"contextual_convnext_atto", "convnext_atto", "as released"}
        assert min(found[what]["milliseconds"].values()) > 0


def test_table_1_has_the_twin_and_the_contextual_model_side_by_side():
    size = ("--model", "atto", "--image-size", "32", "--batch-size", "2", "--rounds", "1")
    rows = report("scripts/benchmark.py", "table1", *size)["results"]
    assert [row["model"] for row in rows] == ["convnext_atto", "contextual_convnext_atto"]
    assert rows[0]["macs"] < rows[1]["macs"]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_the_benchmark_of_the_loss_times_both_kinds_of_targets():
    found = report("scripts/benchmark.py", "loss", "--batch-size", "2", "--rounds", "1")["results"]
    assert set(found["milliseconds"]) == {"soft targets", "hard targets"}


@pytest.mark.parametrize(
    "command", [["scripts/benchmark.py", "loss", "--batch-size", "2", "--rounds", "1"], ["scripts/gpu_check.py", "-h"]]
)
def test_what_runs_on_a_lent_gpu_needs_no_more_than_torch_triton_and_timm(command):
    """gpu_check.sh is for machines that have been set up for nothing else."""
    absent = ["hydra", "omegaconf", "wandb", "nvidia.dali", "rich", "matplotlib", "sklearn"]
    program = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({absent}); sys.argv = {command}; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
def test_the_gpu_check_passes_on_a_cpu():
    """Among others: inductor compiles the whole model without a graph break, and its gradients are the plain ones."""
    found = report("scripts/gpu_check.py", "--device", "cpu", "--quick", timeout=580)
    assert found["passed"]
    assert {"compiles whole, training", "compiles whole, evaluation"} <= {check["check"] for check in found["checks"]}


def test_the_kernels_can_be_tuned():
    found = report(
        "scripts/tune_kernels.py", *("--device", "cpu", "--quick", "--rounds", "1", "--batch-size", "1"),
        TRITON_INTERPRET="1",
    )  # fmt: skip
    (layer,) = found["milliseconds"].values()
    assert set(layer) == {"forward", "gradients of weights and offsets", "gradient of x"}
    assert all(time > 0 for choices in layer.values() for time in choices.values())


def test_the_preview_is_a_picture_of_labelled_rows(image_root, tmp_path):
    output = tmp_path / "preview.png"
    size = ("--columns", "4", "--rows", "1", "--image-size", "32")
    done = run_command("scripts/preview_data.py", str(image_root), "--output", str(output), *size)
    assert done.returncode == 0, done.stderr
    with Image.open(output) as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        assert sheet.width > 4 * 32
        assert sheet.height > 5 * 32  # image, ours, timm's, and two of ours that are mixed
        assert len(sheet.getcolors(sheet.width * sheet.height)) > 1000
    done = run_command("scripts/preview_data.py", str(image_root), "--output", str(tmp_path / "no.such"), *size)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_the_comparison_of_the_loaders_has_nine_distances():
    found = report("scripts/compare_loaders.py", "--images", "96", "--image-size", "32", "--loader", "torch")
    assert found["images"] == 96
    assert len(found["results"]) == 9
    assert found["below_the_line"] >= 7  # each of them is above by chance once in twenty times

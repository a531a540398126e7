"""The whole chain by its commands: train, resume, evaluate, in one process and in several."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import run_command, run_group, small_run, torchrun
from tests.helpers.facts import tells

pytestmark = pytest.mark.run


def losses(folder):
    return {
        row["step"]: row["train/loss"] for row in read_metrics(folder / "run" / "metrics.jsonl") if "train/loss" in row
    }


def checkpoint(folder, name="last"):
    return torch.load(folder / "run" / "checkpoints" / f"{name}.pt", weights_only=True)


def assert_same_state(one, other):
    assert one["step"] == other["step"]
    assert one["best"] == other["best"]
    for part in ("model", "ema"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), f"{part} {name}"
    for key, moments in one["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, other["optimizer"]["state"][key][name])


@pytest.fixture(scope="module")
def straight(image_root, tmp_path_factory):
    """A run of 4 epochs of 3 steps, not interrupted; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("straight")
    done = run_command(*small_run(image_root, folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_its_folder_behind(straight):
    folder, printed = straight
    run = folder / "run"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "train.log", "curves.png"):
        assert (run / name).stat().st_size > 0, name
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.pt", "previous.pt", "best.pt"}
    assert tells(printed, "global", "16", "8", "images", "2", "1", "processes", "3", "epoch")
    assert tells(printed, "epoch", "4", "top-1")
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    evaluated = [row for row in rows if "val/top1" in row]
    assert [row["step"] for row in evaluated] == [3, 6, 9, 12]
    assert all(
        {"val_ema/top1", "val/top5", "val/recall_stage1", "val/recall_stage3"} <= row.keys() for row in evaluated
    )
    assert all(f"train/loss_stage{i}" in rows[0] for i in (1, 2, 3, 4))
    assert rows[0]["train/lr"] == 0
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]


def test_the_loss_falls(straight):
    by_step = losses(straight[0])
    assert by_step[12] < by_step[1] - 0.2


@pytest.mark.parametrize("stop_at", [6, 8], ids=["at an epoch's end", "inside an epoch"])
def test_the_same_command_resumes_bit_for_bit(straight, image_root, tmp_path, stop_at):
    first = run_command(*small_run(image_root, tmp_path, f"trainer.max_steps={stop_at}"))
    assert first.returncode == 0, first.stderr
    assert checkpoint(tmp_path)["step"] == stop_at
    second = run_command(*small_run(image_root, tmp_path))
    assert second.returncode == 0, second.stderr
    assert tells(second.stdout, "resuming", "step", f"{stop_at}")
    assert losses(tmp_path) == losses(straight[0])
    uninterrupted, resumed = checkpoint(straight[0]), checkpoint(tmp_path)
    if stop_at == 8:
        # The extra evaluation at step 8 may find another best epoch; nothing else may differ
        resumed["best"] = uninterrupted["best"]
    assert_same_state(uninterrupted, resumed)


def test_a_complete_run_is_left_alone(straight, image_root):
    folder, _ = straight
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    again = run_command(*small_run(image_root, folder))
    assert again.returncode == 0
    assert "is complete" in again.stdout
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_another_recipe_under_the_same_name_is_refused(straight, image_root):
    again = run_command(*small_run(image_root, straight[0], "optimizer.lr=0.5"))
    assert again.returncode == 2
    assert tells(again.stderr, "optimizer.lr", "0.001", "0.5")
    assert "run_name=NEW_NAME" in again.stderr


def evaluation(done):
    assert done.returncode == 0, done.stderr
    return float(re.search(r"^top-1 (\d+\.\d\d)$", done.stdout.strip().splitlines()[-1]).group(1))


def test_evaluation_equals_the_one_during_training(straight):
    folder, _ = straight
    run = folder / "run"
    last = [row for row in read_metrics(run / "metrics.jsonl") if "val/top1" in row][-1]
    for weights, prefix in (("raw", "val"), ("ema", "val_ema")):
        top1 = evaluation(run_command("evaluate.py", f"checkpoint={run}/checkpoints/last.pt", f"weights={weights}"))
        report = json.loads((run / "checkpoints" / "evaluation.json").read_text())
        assert report["top1"] == last[f"{prefix}/top1"]
        assert top1 == round(report["top1"], 2)
        assert report["top5"] == last[f"{prefix}/top5"]
        for name in ("recall_stage1", "recall_stage2", "recall_stage3"):
            assert report[name] == last[f"{prefix}/{name}"]
        assert (report["images"], report["weights"]) == (18, weights)
        assert report["images_per_second"] > 0


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_counts_every_image_once_at_any_world_size(straight, image_root, tmp_path, processes):
    """17 images, then 16: they divide by neither 2 and 3 nor the batch of 5."""
    data = tmp_path / "images"
    (data / "val").mkdir(parents=True)
    for folder in sorted((image_root / "val").iterdir()):
        (data / "val" / folder.name).mkdir()
        for image in folder.iterdir():
            (data / "val" / folder.name / image.name).symlink_to(image)
    next((data / "val" / "class_3").iterdir()).unlink()
    arguments, found = ["evaluate.py", f"checkpoint={straight[0]}/run", f"data.root={data}", "device=cpu"], []
    for run in (run_command, partial(run_group, processes)):
        done = run(*arguments)
        found.append(evaluation(done))
        (report,) = re.findall(r"^report: (.+)$", done.stdout, re.MULTILINE)
        assert json.loads(Path(report).read_text())["images"] == 17
    assert found[0] == found[1]


def test_two_processes_train_as_one(straight, image_root, tmp_path):
    """The same micro-batches, crops, mixing and dropped paths; only the order of float32 sums differs."""
    done = torchrun(2, *small_run(image_root, tmp_path, "trainer.norm_batch=8"))
    assert done.returncode == 0, done.stderr
    assert tells(done.stdout, "8", "images", "1", "2", "processes")
    assert "Grad strides do not match bucket view strides" not in done.stderr  # DDP would copy those gradients
    alone, shared = losses(straight[0]), losses(tmp_path)
    assert alone.keys() == shared.keys()
    for step in alone:
        assert shared[step] == pytest.approx(alone[step], rel=1e-4)


def test_two_processes_that_accumulate_train_as_one(straight, image_root, tmp_path):
    overrides = ["trainer.micro_batch_size=4", "trainer.norm_batch=4", "trainer.max_steps=3"]
    runs = []
    for run, folder in ((run_command, tmp_path / "alone"), (lambda *c: run_group(2, *c), tmp_path / "shared")):
        done = run(*small_run(image_root, folder, *overrides))
        assert done.returncode == 0, done.stderr
        runs.append(losses(folder))
    assert tells(done.stdout, "4", "images", "2", "processes")
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_one_two_and_four_processes_train_as_one(image_root, tmp_path):
    """The recipe's norm over the whole global batch, whose micro-batches are of 16, 8 and 4 images."""
    runs = []
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        done = run_group(
            processes, *small_run(image_root, folder, "trainer.micro_batch_size=16", "trainer.max_steps=3")
        )
        assert done.returncode == 0, done.stderr
        assert not tells(done.stdout, "batch norms", "instead")
        runs.append(losses(folder))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert runs[2] == pytest.approx(runs[0], rel=1e-4)


def test_a_rank_that_fails_ends_the_run(image_root, tmp_path):
    done = torchrun(2, *small_run(image_root, tmp_path, "trainer.global_batch_size=15"))
    assert done.returncode != 0
    assert done.stderr.count("error: trainer.global_batch_size=15 cannot be shared by 2 processes") == 1


def test_any_timm_model_trains_under_the_same_recipe_and_ranks_share_its_statistics(image_root, tmp_path):
    """Two processes evaluate with batch norm's running statistics alike, and leave one W&B run."""
    overrides = ["model=timm", "model.name=resnet10t", "schedule.epochs=1", "schedule.warmup_epochs=0", "augment=none"]
    arguments = [
        a
        for a in small_run(image_root, tmp_path, *overrides)
        if not a.startswith(("model=contextual", "model.layer", "model.drop"))
    ]
    done = run_group(2, *arguments, "data.image_size=64", "logger.wandb=offline")
    assert done.returncode == 0, done.stderr
    assert "recall" not in done.stdout
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    evaluation(run_command("evaluate.py", f"checkpoint={tmp_path}/run/checkpoints/last.pt", "weights=raw"))
    alone = json.loads((tmp_path / "run" / "checkpoints" / "evaluation.json").read_text())
    (together,) = (row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val/loss" in row)
    assert alone["loss"] == pytest.approx(together["val/loss"], rel=1e-5)


def test_the_papers_selection_says_what_it_risks(image_root, tmp_path):
    done = run_command(*small_run(image_root, tmp_path, "model.selection=reduce", "trainer.max_steps=3"))
    assert done.returncode == 0, done.stderr
    assert tells(done.stdout, "selection=reduce", "classes")
    assert tells(done.stdout, "6", "classes", "4", "3", "2")


@pytest.mark.slow
def test_contextual_convnext_t_trains_at_224(image_root, tmp_path):
    """The command of the README for ImageNet, on a folder of a few classes."""
    command = ["train.py", "model=contextual_convnext_t", f"data.root={image_root}", f"output_dir={tmp_path}"]
    small = ["trainer=smoke", "trainer.device=cpu", "trainer.max_steps=2", "data.eval_batch_size=6", "logger=local"]
    done = run_command(*command, *small)
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stdout
    assert (tmp_path / "contextual_convnext_tiny" / "checkpoints" / "last.pt").exists()

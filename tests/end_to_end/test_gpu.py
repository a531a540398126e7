"""The chain on a GPU: python -m pytest -m gpu. TEST_GPU=cpu runs the same tests on a CPU, to check the tests.

Trainer, evaluation, DALI's graph, several processes; the kernels have their own (tests/ops, scripts/dev/gpu_check.py).
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.distributed import World
from contextual_cnn.runs.loggers import read_metrics
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from tests.conftest import run_command, small_run, torchrun

DEVICE = os.environ.get("TEST_GPU", "cuda")
IS_THERE = DEVICE == "cpu" or torch.cuda.is_available()
COUNT = torch.cuda.device_count() if DEVICE == "cuda" else 2

pytestmark = [pytest.mark.gpu, pytest.mark.run, pytest.mark.skipif(not IS_THERE, reason="needs a GPU")]


def on_device(image_root: Path, folder: Path, *overrides: str) -> list[str]:
    batches = ["trainer.micro_batch_size=16", "trainer.norm_batch=16", "data.image_size=64", "trainer.compile=false"]
    return small_run(image_root, folder, f"trainer.device={DEVICE}", *batches, *overrides)


def rows_of(folder: Path) -> list[dict]:
    return read_metrics(folder / "run" / "metrics.jsonl")


def losses_of(folder: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in rows_of(folder) if "train/loss" in row}


@pytest.fixture(scope="module")
def straight(image_root, tmp_path_factory):
    """The folder of a run of 12 steps."""
    folder = tmp_path_factory.mktemp("straight")
    done = run_command(*on_device(image_root, folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_learns_and_says_what_the_card_holds(straight):
    losses = losses_of(straight)
    assert list(losses) == list(range(1, 13))
    assert np.mean([losses[step] for step in (10, 11, 12)]) < losses[1]
    if DEVICE == "cuda":
        memory = [row["train/memory_gib"] for row in rows_of(straight) if "train/memory_gib" in row]
        assert 0.3 < max(memory) < torch.cuda.get_device_properties(0).total_memory / 2**30


def test_a_resumed_run_goes_on_with_the_same_data_and_draws(straight, image_root, tmp_path):
    """Bit for bit on a CPU; cuDNN and atomics leave a GPU's last bits open."""
    for steps in (5, 12):
        done = run_command(*on_device(image_root, tmp_path, f"trainer.max_steps={steps}"))
        assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path) == pytest.approx(losses_of(straight), rel=0 if DEVICE == "cpu" else 0.02)


def test_a_resume_may_change_the_memory_format(straight, image_root, tmp_path):
    """The moments get the parameters' strides, which fused AdamW on a GPU insists on."""
    for change in ("trainer.max_steps=5", "trainer.channels_last=false"):
        done = run_command(*on_device(image_root, tmp_path, change))
        assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path) == pytest.approx(losses_of(straight), rel=0.02)


def test_an_evaluation_alone_finds_what_the_training_found(straight):
    (last,) = (row for row in rows_of(straight) if row["step"] == 12 and "val/loss" in row)
    done = run_command(
        "evaluate.py", f"checkpoint={straight}/run/checkpoints/last.pt", f"device={DEVICE}", "weights=raw"
    )
    assert done.returncode == 0, done.stderr
    (file,) = re.findall(r"^report: (.+)$", done.stdout, re.MULTILINE)
    report = json.loads(Path(file).read_text())
    assert report["loss"] == pytest.approx(last["val/loss"], rel=1e-5)
    assert report["top1"] == last["val/top1"]


@pytest.mark.skipif(COUNT < 2, reason="needs two GPUs")
def test_two_processes_train_as_one(straight, image_root, tmp_path):
    """Half the micro-batch each, joined in the batch norms."""
    done = torchrun(2, *on_device(image_root, tmp_path, "trainer.micro_batch_size=8"))
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path) == pytest.approx(losses_of(straight), rel=1e-4 if DEVICE == "cpu" else 0.05)


def batches(image_root: Path, device: str, micro_batch: int, augment: AugmentSettings, count: int):
    """(images, targets) of the training, and of the val split, from DALI's graph for a device; on the CPU."""
    data = ImageData(DataSettings(root=str(image_root), image_size=64, threads=2, eval_batch_size=5))
    plan = BatchPlan.make(images=48, global_batch=micro_batch, micro_batch=micro_batch, world_size=1)
    world = World(0, 1, 0, torch.device(device, 0) if device == "cuda" else torch.device("cpu"))
    training = data.train_batches(plan, augment, 0, world, 0)
    found = [next(training) for _ in range(count)] + list(data.evaluation_batches(world))
    return [(batch.images.float().cpu(), batch.targets.cpu()) for batch in found]


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
@pytest.mark.parametrize(
    ("augment", "levels"), [(dict(randaugment=None, color_jitter=0.0), 1.0), ({}, 2.0)], ids=["crop and flip", "recipe"]
)
def test_dalis_graph_for_a_gpu_makes_the_images_of_the_one_for_a_cpu(image_root, micro_batch, augment, levels):
    """Up to decoder and resize, a level of 255 on average; of 1 or 2 images, branches of the graph stay empty."""
    count = 24 // micro_batch
    ours = batches(image_root, DEVICE, micro_batch, AugmentSettings(**augment), count)
    reference = batches(image_root, "cpu", micro_batch, AugmentSettings(**augment), count)
    assert len(ours) == len(reference)
    differences = []
    for (images, targets), (expected, same) in zip(ours, reference, strict=True):
        assert torch.equal(targets, same)
        differences.append((images - expected).abs().mean().item() * 255 * 0.226)  # of values over a deviation of 0.226
    assert np.mean(differences) < levels

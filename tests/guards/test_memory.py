"""Memory that does not suffice, or grows. The GPU's own refusal is stood in for: there is none here."""

import logging
import sys

import pytest
import torch

import train
from contextual_cnn import exits
from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.distributed import World
from contextual_cnn.engine.training_step import TrainingStep
from contextual_cnn.errors import UserError
from contextual_cnn.guards.memory import GrowthWatch, explained_shortage
from tests.conftest import run_python, small_run
from tests.helpers.facts import tells


@pytest.mark.run
@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torchrun's error file wants the real stderr
def test_a_gpu_that_is_too_small_is_told_a_batch_that_keeps_the_recipe(image_root, tmp_path, monkeypatch, capsys):
    def refuse(training_step, batch, last):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingStep, "_accumulate", refuse)
    monkeypatch.setattr(sys, "argv", small_run(image_root, tmp_path))
    with pytest.raises(SystemExit) as stopped:
        exits.run(train.main)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert tells(printed, "8", "images", "step", "1")
    assert tells(printed, "trainer.micro_batch_size=4", "16", "4")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Critical error in pipeline: CUDA allocation failed: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=["torch", "DALI", "cuDNN", "the host"],
)
def test_whoever_runs_out_of_memory_gets_the_same_advice(error):
    plan = BatchPlan.make(images=100, global_batch=16, micro_batch=8, world_size=1)
    with pytest.raises(UserError) as refused, explained_shortage(World(0, 1, 0, torch.device("cuda:0")), plan, 0):
        raise error
    assert "trainer.micro_batch_size=4" in refused.value.fix


def test_another_error_stays_what_it_is():
    plan = BatchPlan.make(images=100, global_batch=16, micro_batch=8, world_size=1)
    with pytest.raises(RuntimeError, match="illegal"), explained_shortage(World(0, 1, 0, torch.device("cpu")), plan, 0):
        raise RuntimeError("an illegal memory access was encountered")


def test_growth_is_said_once_for_each_quarter(caplog):
    watch = GrowthWatch()
    with caplog.at_level(logging.WARNING):
        for gib in (4.0, 4.9, 5.1, 5.2, 6.5, 4.0):
            watch.look(gib)
    assert [record.args for record in caplog.records] == [(4.0, 5.1), (5.1, 6.5)]


@pytest.mark.run
def test_the_memory_is_this_processs():
    """In a process of its own: here other threads take and give back memory."""
    program = (
        "from contextual_cnn.guards.memory import resident_gib; before = resident_gib(); "
        "ballast = bytearray(b'x') * 2**29; print(resident_gib() - before)"
    )
    done = run_python("-c", program)
    assert float(done.stdout) == pytest.approx(0.5, abs=0.1), done.stderr

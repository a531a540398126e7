"""Runs that are stopped, killed and started again, by their real commands: nothing is lost, nothing differs."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from contextual_cnn.runs.checkpoint import load_checkpoint, step_of, write_checkpoint
from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import ROOT, run_group, run_python, small_run
from tests.helpers.endings import assert_same_end, checkpoint, losses, steps_logged
from tests.helpers.facts import tells
from tests.helpers.quick_start import Command, run

pytestmark = pytest.mark.run

STEPS = 12  # 4 epochs of 3


@pytest.fixture(scope="module")
def straight(image_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    status, printed = run(*small_run(image_root, folder), output=folder / "output")
    assert status == 0, printed
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_saves_the_step_and_the_same_command_goes_on(straight, image_root, tmp_path, number):
    started = Command(*small_run(image_root, tmp_path), output=tmp_path / "output")
    started.wait_until(lambda: 4 in steps_logged(tmp_path))
    started.send(number)
    asked = time.monotonic()
    assert started.wait() == 75, started.printed
    assert time.monotonic() - asked < 20
    step = checkpoint(tmp_path)["step"]
    assert 4 <= step < STEPS
    last_line = started.printed.strip().splitlines()[-1]
    assert last_line.startswith(f"stopped after step {step}: {number.name} received; saved in ")
    assert last_line.endswith("last.pt; the same command goes on from there")
    status, printed = run(*small_run(image_root, tmp_path), output=tmp_path / "output")
    assert status == 0, printed
    assert tells(printed, "resuming", "step", f"{step}")
    assert_same_end(straight, tmp_path)


@pytest.mark.slow
def test_stopped_again_and_again(straight, image_root, tmp_path):
    """Each start is stopped as soon as it has made a step: inside epochs, at their ends, after them."""
    status, starts = 75, 0
    while status == 75:
        started, before = Command(*small_run(image_root, tmp_path), output=tmp_path / "output"), steps_logged(tmp_path)
        try:
            started.wait_until(lambda before=before: steps_logged(tmp_path) not in ([], before))
            started.send(signal.SIGTERM)
        except TimeoutError:  # it was complete before it was seen
            assert started.process.exitcode == 0
        status, starts = started.wait(), starts + 1
    assert status == 0, started.printed
    assert starts > 3
    assert_same_end(straight, tmp_path)


def test_a_time_limit_stops_as_a_signal_does(image_root, tmp_path):
    limit = "trainer.max_time=0.00001"
    status, printed = run(*small_run(image_root, tmp_path, limit), output=tmp_path / "output")
    assert status == 75, printed
    assert tells(printed, "stopped", "step", "1", "trainer.max_time")


def test_a_stop_during_an_evaluation_saves_at_once_and_evaluates_later(straight, image_root, tmp_path):
    """One image per batch makes the evaluation long enough to be met in it."""
    command = small_run(image_root, tmp_path, "data.eval_batch_size=1")
    started = Command(*command, output=tmp_path / "output")
    started.wait_until(lambda: 3 in steps_logged(tmp_path))
    started.send(signal.SIGTERM)
    assert started.wait() == 75, started.printed
    state = checkpoint(tmp_path)
    assert state["step"] in (3, 4)
    assert state["ended_step"] == (0 if state["step"] == 3 else 3)
    status, printed = run(*command, output=tmp_path / "output")
    assert status == 0, printed
    evaluated = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val/top1" in row]
    assert evaluated == [3, 6, 9, 12]
    assert torch.equal(checkpoint(tmp_path)["model"]["stem.0.weight"], checkpoint(straight)["model"]["stem.0.weight"])


def test_a_second_ctrl_c_ends_at_once(image_root, tmp_path):
    started = Command(*small_run(image_root, tmp_path), output=tmp_path / "output")
    started.wait_until(lambda: 1 in steps_logged(tmp_path))
    while started.process.is_alive():
        started.send(signal.SIGINT)
        time.sleep(0.6)
    assert started.wait() in (75, -signal.SIGINT)


@pytest.mark.slow
def test_killed_at_random_moments_with_the_newest_file_damaged(straight, image_root, tmp_path):
    """kill -9, saves included; every other time the newest checkpoint gets a flipped bit before the next start."""
    draw = random.Random(0)
    command = small_run(image_root, tmp_path, "checkpoint.every_steps=1")
    folder = tmp_path / "run" / "checkpoints"

    def newest_step():
        return max((step_of(path) or 0 for path in folder.glob("*.pt")), default=0)

    kills = fell_back = 0
    while newest_step() < 11:
        saved = newest_step()
        started = Command(*command, output=tmp_path / "output")
        started.wait_until(lambda saved=saved: newest_step() > saved)  # however slow the machine is, it gets on
        started.process.join(draw.uniform(0, 0.15))
        started.process.kill()
        if started.wait() == 0:
            break
        kills += 1
        assert newest_step() > saved
        newest = folder / "last.pt"
        if kills % 2 == 0 and (folder / "previous.pt").exists() and newest.exists():  # a kill may fall between renames
            content = bytearray(newest.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            newest.write_bytes(content)
            fell_back += 1
    status, printed = run(*command, output=tmp_path / "output")
    assert status == 0, printed
    assert kills > 1
    assert fell_back > 0
    assert_same_end(straight, tmp_path)


def test_two_runs_do_not_write_into_one_folder(image_root, tmp_path):
    command = small_run(image_root, tmp_path)
    first = Command(*command, "schedule.epochs=100", output=tmp_path / "first")
    first.wait_until(lambda: 1 in steps_logged(tmp_path))
    second = Command(*command, "schedule.epochs=100", output=tmp_path / "second")
    second.wait_until(lambda: "is in use by process" in second.printed)
    assert tells(second.printed, "process", f"{first.process.pid}")
    first.process.kill()
    second.wait_until(lambda: "run folder" in second.printed)  # the lock went with its owner
    second.process.kill()


def test_two_runs_started_together_in_a_new_folder_are_one_run(straight, image_root, tmp_path):
    """Neither sees a folder when it looks first; the one that waits goes on from what the other one has saved."""
    command = small_run(image_root, tmp_path)
    both = [Command(*command, output=tmp_path / f"output_{i}") for i in range(2)]
    both[0].wait_until(lambda: any("is in use by process" in one.printed for one in both))
    waiting = next(one for one in both if "is in use by process" in one.printed)
    owner = next(one for one in both if one is not waiting)
    owner.wait_until(lambda: 4 in steps_logged(tmp_path))
    owner.send(signal.SIGTERM)
    assert owner.wait() == 75, owner.printed
    step = checkpoint(tmp_path)["step"]
    assert waiting.wait() == 0, waiting.printed
    assert tells(waiting.printed, "resuming", "step", f"{step}")
    assert_same_end(straight, tmp_path)


def test_a_full_disk_costs_no_step_and_is_an_error_at_the_end(straight, image_root, tmp_path):
    """Files of this process may not grow beyond 64 KiB: no checkpoint fits, the metrics do."""
    status, printed = run(*small_run(image_root, tmp_path), output=tmp_path / "output", TEST_LARGEST_FILE=str(1 << 16))
    assert status == 2, printed
    assert tells(printed, "checkpoint", "step", "3")
    assert tells(printed, "error", "checkpoint", "step", "12")
    assert losses(tmp_path) == losses(straight)


def test_another_number_of_processes_goes_on_where_the_run_stands(straight, image_root, tmp_path):
    """Two processes stop inside an epoch, one goes on: the same global batches, so the same losses but for rounding."""
    shared = small_run(image_root, tmp_path, "trainer.norm_batch=8")
    done = run_group(2, *shared, "trainer.max_steps=7")
    assert done.returncode == 0, done.stderr
    status, printed = run(*shared, output=tmp_path / "output")
    assert status == 0, printed
    assert tells(printed, "2", "processes", "1")
    for (step, loss, *_), (same_step, other, *_) in zip(trained(straight), trained(tmp_path), strict=True):
        assert step == same_step
        assert other == pytest.approx(loss, rel=1e-4)


def trained(folder):
    return [row for row in losses(folder) if row[1] is not None]


@pytest.fixture(scope="module")
def stopped_inside(image_root, tmp_path_factory):
    """The folder of a run that was stopped after step 4, or little later."""
    folder = tmp_path_factory.mktemp("inside")
    started = Command(*small_run(image_root, folder), output=folder / "output")
    started.wait_until(lambda: 4 in steps_logged(folder))
    started.send(signal.SIGTERM)
    assert started.wait() == 75, started.printed
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [None, "model", "ema", "optimizer", "best", "step"])
def test_whatever_is_left_out_of_the_state_is_noticed(straight, stopped_inside, image_root, tmp_path, dropped):
    """Each part as it is at a run's start; then the end must differ, or the comparison above sees nothing."""
    shutil.copytree(stopped_inside / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    state = load_checkpoint(path)
    assert 4 <= state["step"] < STEPS
    at_start = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()},
        "ema": state["model"],
        "optimizer": state["optimizer"] | {"state": {}},
        "best": state["best"] | {"top1": 101.0},
        "step": state["step"] - 1,
    }
    if dropped is not None:
        write_checkpoint(state | {dropped: at_start[dropped]}, path)
    status, printed = run(*small_run(image_root, tmp_path), output=tmp_path / "output")
    assert status == 0, printed
    if dropped is None:
        assert_same_end(straight, tmp_path)
    else:
        with pytest.raises(AssertionError):
            assert_same_end(straight, tmp_path)


def test_a_trainer_that_is_killed_leaves_no_process(image_root, tmp_path):
    """The torch loader's workers are children of a fork server, which outlives the trainer as long as they do."""
    command = small_run(image_root, tmp_path, "data.loader=torch", "data.threads=2", "schedule.epochs=100")
    environment = {**os.environ, "TEST_MARK": str(tmp_path), "OMP_NUM_THREADS": "1"}
    trainer = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while 2 not in steps_logged(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(marked(tmp_path)) >= 4  # trainer, fork server, two workers of the training
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while marked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked(tmp_path) == []


def marked(folder):
    """The processes that have this folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"TEST_MARK={folder}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes())
    return found


RESUMED = """
import gc, runpy, sys
import torch
from contextual_cnn.engine.trainer import Trainer

def fit(trainer, *_):
    step = trainer.train_step
    kept = {id(t) for model in step.evaluated().values() for t in model.state_dict(keep_vars=True).values()}
    kept |= {id(t) for state in step.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    own = {t.untyped_storage().data_ptr() for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) in kept}
    others = {}
    for t in gc.get_objects():
        if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in own:
            others[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    print("left over:", sum(others.values()), "of", sum(t.nbytes for t in step.module.state_dict().values()))
    return True

Trainer.fit = fit
sys.argv = sys.argv[1:]
runpy.run_path("train.py", run_name="__main__")
"""


def test_nothing_of_the_checkpoint_is_kept_after_a_resume(image_root, tmp_path):
    """It is as large as weights, average and moments together, in every process."""
    command = small_run(image_root, tmp_path, "trainer.max_steps=2")
    status, printed = run(*command, output=tmp_path / "output")
    assert status == 0, printed
    done = run_python("-c", RESUMED, *small_run(image_root, tmp_path, "trainer.max_steps=4"))
    left, model = map(int, re.search(r"left over: (\d+) of (\d+)", done.stdout).groups())
    assert "resuming" in done.stdout
    assert left < 0.05 * model

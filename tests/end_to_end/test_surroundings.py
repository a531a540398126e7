"""Slow disks, terminals that go away, processes that disappear, folders and files as they should not be."""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import ROOT
from tests.helpers.endings import checkpoint, steps_logged
from tests.helpers.facts import tells
from tests.helpers.kills import smallest_run
from tests.helpers.launched import command_of, descendants
from tests.helpers.quick_start import Command, run

pytestmark = pytest.mark.run


def test_waiting_for_images_is_said(image_root, tmp_path):
    """Images of 9 megapixels, which take longer to decode than to train on."""
    root = shutil.copytree(image_root, tmp_path / "images")
    noise = np.random.default_rng(0).integers(0, 255, (3000, 3000, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.JPEG", quality=90)
    for image in root.glob("train/*/*.JPEG"):
        image.unlink()
        image.symlink_to(tmp_path / "large.JPEG")
    status, printed = run(*smallest_run(root, tmp_path, "trainer.max_steps=3"), output=tmp_path / "output")
    assert status == 0, printed
    assert printed.count("% of the time went by in waiting for images; more data.threads") == 1
    waits = [row["train/data_wait"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert max(waits) > 20


def test_nobody_reads_what_is_printed(image_root, tmp_path):
    """The pipe's reader ends after the first line; then the terminal hangs up, which saves and ends the run."""
    command = smallest_run(image_root, tmp_path, "schedule.epochs=200")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Under nohup the tests' own processes ignore SIGHUP, and so would this one
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        process.stdout.readline()
        process.stdout.close()
        deadline = time.monotonic() + 120
        while max(steps_logged(tmp_path), default=0) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        complaints = process.stderr.read().decode()
    assert process.returncode == 75, complaints
    assert "Traceback" not in complaints
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics.endswith("}\n")
    assert checkpoint(tmp_path)["step"] == steps_logged(tmp_path)[-1]


def kill_loaders(trainer: int) -> None:
    """The processes that the trainer's fork server has started; not the server, which would be started again."""
    for server in descendants(trainer):
        for pid in descendants(server):
            if "forkserver" in command_of(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_a_killed_loader_process_ends_the_run_with_its_name(image_root, tmp_path):
    command = smallest_run(image_root, tmp_path, "data.loader=torch", "schedule.epochs=500")
    started = Command(*command, output=tmp_path / "output")
    started.wait_until(lambda: max(steps_logged(tmp_path), default=0) > 2)
    while started.process.exitcode is None:  # between two epochs there may be no loader process, or one that is done
        kill_loaders(started.process.pid)
        time.sleep(0.05)
    assert started.wait() == 1
    assert "DataLoader worker" in started.printed
    assert checkpoint(tmp_path)["step"] > 0


def test_a_folder_that_cannot_be_made_is_named(image_root, tmp_path):
    (tmp_path / "file").write_text("")
    status, printed = run(*smallest_run(image_root, tmp_path / "file"), output=tmp_path / "output")
    assert status == 2, printed
    assert tells(printed, f"{tmp_path}/file/run")
    assert tells(printed, "output_dir=FOLDER")


def test_a_complete_training_is_complete_whatever_is_in_the_place_of_its_picture(image_root, tmp_path):
    """And no file that is written whole is written through a link."""
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    (folder / "curves.png").mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        (folder / name).symlink_to(victim)
    command = smallest_run(image_root, tmp_path, "trainer.max_steps=1")
    status, printed = run(*command, output=tmp_path / "output")
    assert status == 0, printed
    assert "Traceback" not in printed
    assert str(folder / "curves.png") in printed
    assert checkpoint(tmp_path)["step"] == 1
    assert victim.read_text() == "mine"


def test_a_lock_that_is_a_link_is_not_followed(image_root, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(victim)
    status, printed = run(*smallest_run(image_root, tmp_path, "trainer.max_steps=1"), output=tmp_path / "output")
    assert status == 2, printed
    assert str(tmp_path / "run" / "lock") in printed
    assert victim.read_text() == "mine"


def test_no_file_is_wider_than_the_umask(image_root, tmp_path):
    short = ["trainer.max_steps=1", "logger=wandb"]
    arguments = [a for a in smallest_run(image_root, tmp_path, *short) if a != "logger=local"]
    status, printed = run(*arguments, output=tmp_path / "output", TEST_UMASK="077")
    assert status == 0, printed
    paths = [path for path in (tmp_path / "run").rglob("*") if not path.is_symlink()]
    assert {"last.pt", "metrics.jsonl", "config.yaml", "train.log"} <= {path.name for path in paths}
    assert [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077] == []

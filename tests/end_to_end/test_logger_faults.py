"""Whatever happens to W&B or to the metrics file, train.py trains to its end and no row is lost."""

import os
import signal
from pathlib import Path

import pytest

from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import small_run
from tests.helpers.facts import tells
from tests.helpers.fake_wandb import misbehaving_server
from tests.helpers.quick_start import Command, run

pytestmark = pytest.mark.run

KEY = "f0e1d2c3b4a5968778695a4b3c2d1e0f01234567"  # planted: it must not be found in anything that a run writes


def command(image_root, folder, *overrides):
    short = ["schedule.epochs=2", "logger=wandb", "logger.patience=2", *overrides]
    return [argument for argument in small_run(image_root, folder, *short) if argument != "logger=local"]


def assert_complete(folder):
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/top1" in row] == [3, 6]


def assert_holds_no(secret, folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("how", ["500", "hangs", "500 later", "hangs later"])
def test_a_server_that_misbehaves(image_root, tmp_path, how):
    with misbehaving_server(how) as address:
        environment = dict(WANDB_API_KEY=KEY, WANDB_BASE_URL=address, WANDB_MODE="online")
        status, printed = run(*command(image_root, tmp_path), output=tmp_path / "output", **environment)
    assert status == 0, printed
    assert "W&B" in printed
    assert_complete(tmp_path)
    assert_holds_no(KEY, tmp_path)


def test_no_key_no_network_no_prompt(image_root, tmp_path):
    environment = dict(WANDB_MODE="", WANDB_API_KEY="", NETRC=str(tmp_path / "netrc"))
    status, printed = run(*command(image_root, tmp_path), output=tmp_path / "output", **environment)
    assert status == 0, printed
    assert tells(printed, "W&B", "offline")
    assert_complete(tmp_path)


def test_its_helper_process_is_killed(image_root, tmp_path):
    started = Command(*command(image_root, tmp_path), output=tmp_path / "output")
    started.wait_until(lambda: "W&B: offline run" in started.printed)
    children = Path(f"/proc/{started.process.pid}/task")
    pids = {int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()}
    helpers = [pid for pid in pids if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert helpers
    for pid in helpers:
        os.kill(pid, signal.SIGKILL)
    assert started.wait() == 0, started.printed
    assert tells(started.printed, "W&B", "metrics.jsonl")
    assert_complete(tmp_path)


def test_a_full_disk_keeps_the_rows_until_there_is_room(tmp_path, caplog):
    """In a child of its own: the limit on the size of its files is lifted half way."""
    status, printed = run("tests/helpers/full_disk.py", str(tmp_path), output=tmp_path / "output")
    assert status == 0, printed
    assert printed.count("cannot be written") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 101))


def test_no_secret_of_the_environment_is_written(image_root, tmp_path):
    environment = dict(WANDB_API_KEY=KEY, WANDB_MODE="offline", AWS_SECRET_ACCESS_KEY=KEY[::-1])
    status, printed = run(*command(image_root, tmp_path), output=tmp_path / "output", **environment)
    assert status == 0, printed
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    for secret in (KEY, KEY[::-1]):
        assert_holds_no(secret, tmp_path)

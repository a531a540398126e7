"""The local file is the truth; W&B may fail in any way it likes."""

import json
import os
import socket
import subprocess
import time

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import RunRecord

from contextual_cnn.errors import UserError
from contextual_cnn.runs.loggers import JsonLinesLogger, open_loggers, read_metrics
from contextual_cnn.settings.logger import LoggerSettings
from tests.helpers.facts import tells


@pytest.fixture(autouse=True)
def _no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_rows_of_a_killed_run_beyond_the_checkpoint_are_written_again_not_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonLinesLogger(path, resumed_step=0)
    for step in range(1, 8):
        logger.log(step, {"loss": step / 2})
    logger.close()
    path.write_text(path.read_text() + '{"step": 8, "lo')  # killed in the middle of a line
    logger = JsonLinesLogger(path, resumed_step=5)
    logger.log(6, {"loss": 3.0})
    logger.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


@pytest.mark.parametrize(
    "line",
    [b"12", b"null", b"[]", b'"step"', b'{"loss": 1}', b'{"step": "3"}', b'{"step": 2.5}', b'{"step": Infinity}',
     b'{"step": 3, "loss": "low"}', b'{"step": 3, "lo', b"\xff\xfe\x00", b"[" * 100_000, b"9" * 10_000, b"x" * 10**7],
    ids=lambda line: repr(line[:20]),
)  # fmt: skip
def test_a_line_that_is_not_a_row_costs_none(tmp_path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 2, "loss": 1.0}\n{"step": 3, "loss": 0.5}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert str(path) in caplog.text
    logger = JsonLinesLogger(path, resumed_step=2)
    logger.log(3, {"loss": 0.25})
    logger.close()
    assert [row["loss"] for row in read_metrics(path)] == [2.0, 1.0, 0.25]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_metrics_that_are_not_a_file_are_refused(tmp_path, kind):
    victim, path = tmp_path / "victim", tmp_path / "metrics.jsonl"
    victim.write_text("mine")
    {"link": lambda: path.symlink_to(victim), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(UserError) as refused:
        JsonLinesLogger(path, resumed_step=0)
    assert str(path) in refused.value.cause
    assert victim.read_text() == "mine"


@pytest.mark.run
def test_without_a_key_wandb_runs_offline_and_keeps_its_id(tmp_path):
    ids = []
    for resumed_step in (0, 3):
        logger = open_loggers(tmp_path, LoggerSettings(wandb="auto"), {"lr": 0.1}, "name", resumed_step)
        logger.log(resumed_step + 1, {"train/loss": 1.0})
        logger.close()
        ids.append((tmp_path / "wandb_id.txt").read_text())
    assert ids[0] == ids[1]
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) >= 1
    assert all(f"-{ids[0]}" in run.name for run in runs)  # a second one within a second is ID-1


def test_online_without_a_key_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match="API key"):
        open_loggers(tmp_path, LoggerSettings(wandb="online"), {}, "name", 0)


@pytest.mark.run
def test_unreachable_wandb_goes_offline_in_seconds(tmp_path, monkeypatch):
    """The real client, a key, and nobody at the address: a closed port of this machine."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("contextual_cnn.runs.wandb_logger._INIT_TIMEOUT", 3)
    started = time.perf_counter()
    logger = open_loggers(tmp_path, LoggerSettings(wandb="auto"), {"lr": 0.1}, "name", 0)
    assert time.perf_counter() - started < 60  # its own patience is 100 s
    logger.log(1, {"train/loss": 1.0})
    logger.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}]


def test_wandb_writes_nowhere_but_in_the_run_folder(tmp_path, monkeypatch, caplog):
    """Where it cannot make its folder, W&B falls back to the one for temporary files, which everybody can look into."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    run = tmp_path / "run"
    run.mkdir()
    (run / "wandb").write_text("a file where the folder would be")
    logger = open_loggers(run, LoggerSettings(wandb="offline"), {"lr": 0.1}, "name", 0)
    logger.log(1, {"train/loss": 1.0})
    logger.close()
    assert tells(caplog.text, "W&B", "folder")
    assert not list(temporary.iterdir())
    assert read_metrics(run / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}]


def test_wandb_is_told_neither_the_host_nor_the_remote_of_the_clone(tmp_path, monkeypatch):
    clone, run = tmp_path / "clone", tmp_path / "run"
    clone.mkdir()
    run.mkdir()
    author = ["-c", "user.name=A", "-c", "user.email=a@b.invalid"]
    remote = ["remote", "add", "origin", "https://somebody:secret@remote.invalid/x.git"]
    for arguments in (["init", "-q"], remote, [*author, "commit", "-q", "--allow-empty", "-m", "A commit"]):
        subprocess.run(["git", *arguments], cwd=clone, check=True)
    monkeypatch.chdir(clone)
    logger = open_loggers(run, LoggerSettings(wandb="offline"), {"lr": 0.1}, "name", 0)
    logger.log(1, {"train/loss": 1.0})
    logger.close()
    (mirror,) = run.glob("wandb/offline-run-*/run-*.wandb")
    wandb.teardown()  # its helper process has written everything
    assert b"contextual-cnn" in mirror.read_bytes()
    assert b"remote.invalid" not in mirror.read_bytes()
    assert RunRecord(host=socket.gethostname()).SerializeToString() not in mirror.read_bytes()

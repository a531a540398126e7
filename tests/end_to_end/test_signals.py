"""Signals before there is anything to lose: from the first line of train.py on, wherever the process is, 75 and soon.

What comes after the first step is in test_interruptions.py, and the launcher's part in test_launcher.py.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import HAS_COMPILER, ROOT, small_run
from tests.helpers.endings import assert_same_end, checkpoint, steps_logged
from tests.helpers.kills import smallest_run
from tests.helpers.launched import descendants, has_loaded, is_running, listens
from tests.helpers.quick_start import Command, group, run

pytestmark = pytest.mark.run

SOON = 20  # seconds


@pytest.mark.parametrize(
    ("script", "number", "library"),
    [
        ("train.py", signal.SIGTERM, None),
        ("train.py", signal.SIGINT, "libtorch_cpu.so"),
        ("train.py", signal.SIGUSR1, "torchvision/_C"),
        ("evaluate.py", signal.SIGINT, "libtorch_cpu.so"),
    ],
    ids=["train, first line", "train, imports of torch", "train, imports of torchvision", "evaluate, imports of torch"],
)
def test_a_signal_during_the_imports(image_root, tmp_path, script, number, library):
    (tmp_path / "some.pt").touch()
    arguments = small_run(image_root, tmp_path)[1:] if script == "train.py" else [f"checkpoint={tmp_path}/some.pt"]
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (has_loaded(process.pid, library) if library else listens(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=SOON)
    assert process.returncode == 75, printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_signals_at_random_moments_of_the_start(image_root, tmp_path):
    """Config, data, model, folder, pipelines, first step: none of them may end otherwise, and the run ends as ever."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    status, printed = run(*smallest_run(image_root, straight), output=straight / "output")
    assert status == 0, printed
    draw, moments = random.Random(0), 5
    for _ in range(moments):
        started = Command(*smallest_run(image_root, stopped), output=stopped / "output")
        started.wait_until(lambda process=started.process: listens(process.pid))
        started.process.join(draw.uniform(0, 1.5))
        with suppress(ProcessLookupError):  # on a fast machine it has ended by itself, with status 0
            started.send(draw.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)))
        status = started.wait(SOON)
        assert status in (75, 0), started.printed
        assert "Traceback" not in started.printed
        if status == 0:
            break
    status, printed = run(*smallest_run(image_root, stopped), output=stopped / "output")
    assert status == 0, printed
    assert_same_end(straight, stopped)


def test_a_signal_while_the_others_are_waited_for(image_root, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    alone = Command(*smallest_run(image_root, tmp_path), output=tmp_path / "output", **place)
    alone.wait_until(lambda: is_open(port))
    alone.send(signal.SIGTERM)
    assert alone.wait(SOON) == 75, alone.printed


def is_open(port: int) -> bool:
    with socket.socket() as other:
        return other.connect_ex(("127.0.0.1", port)) == 0


def test_a_signal_in_a_collective_of_the_first_step(image_root, tmp_path):
    """The other process stands still, so the all-reduce of the gradients never ends."""
    ranks = group(2, *smallest_run(image_root, tmp_path), folder=tmp_path)
    ranks[0].wait_until(lambda: "run folder" in ranks[0].printed)
    ranks[1].send(signal.SIGSTOP)
    ranks[0].send(signal.SIGTERM)
    try:
        assert ranks[0].wait(SOON) == 75, ranks[0].printed
    finally:
        ranks[1].process.kill()


def test_a_signal_while_the_kernels_are_compiled(image_root, tmp_path):
    compiler = tmp_path / "slow_compiler"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/compiling\nexec sleep 60\n")
    compiler.chmod(0o755)
    environment = dict(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path / "cache"))
    started = Command(*small_run(image_root, tmp_path), output=tmp_path / "output", **environment)
    started.wait_until(lambda: (tmp_path / "compiling").exists())
    started.send(signal.SIGTERM)
    assert started.wait(SOON) == 75, started.printed
    assert not (tmp_path / "run").exists()


def test_no_process_is_left_behind(image_root, tmp_path):
    command = smallest_run(image_root, tmp_path, "data.loader=torch", "schedule.epochs=500")
    started = Command(*command, output=tmp_path / "output")
    started.wait_until(lambda: descendants(started.process.pid))
    children = descendants(started.process.pid)
    started.send(signal.SIGINT)
    assert started.wait(SOON) == 75, started.printed
    deadline = time.monotonic() + SOON
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_a_signal_while_torch_compiles_costs_no_step(image_root, tmp_path):
    """In the first step of a run that goes on from step 4, which takes longer than anybody waits."""
    command = smallest_run(image_root, tmp_path)
    status, printed = run(*command, "trainer.max_steps=4", output=tmp_path / "output")
    assert status == 0, printed
    cache = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    started = Command(*command, "trainer.compile=true", output=tmp_path / "output", **cache)
    started.wait_until(lambda: any(is_compiler(pid) for pid in descendants(started.process.pid)), timeout=200)
    started.send(signal.SIGTERM)
    assert started.wait(SOON) == 75, started.printed
    assert checkpoint(tmp_path)["step"] == 4
    assert steps_logged(tmp_path) == [1, 2, 3, 4]


def is_compiler(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("cc1plus", "g++", "c++")
    except OSError:  # it has ended
        return False

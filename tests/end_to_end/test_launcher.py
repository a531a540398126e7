"""scripts/launch.sh and torchrun: processes that die, are told to stop, or lose their launcher."""

import os
import signal
import socket
import sys
import time

import pytest

from tests.conftest import run_group, run_python, small_run
from tests.helpers.endings import assert_same_end, checkpoint, steps_logged
from tests.helpers.facts import tells
from tests.helpers.launched import Launched, has_loaded, is_running
from tests.helpers.quick_start import free_port, group

pytestmark = pytest.mark.run

SOON = 20  # seconds, from a signal to the end


@pytest.fixture(scope="module")
def straight(image_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    done = run_group(2, *small_run(image_root, folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_signal_to_any_process_stops_all_at_the_same_step(straight, image_root, tmp_path):
    """First to the launcher, then, in the run that goes on, to one process; the third start completes the run."""
    command = small_run(image_root, tmp_path)
    launched = Launched(tmp_path, *command)
    launched.wait_until_step(1)
    os.kill(launched.process.pid, signal.SIGTERM)
    assert launched.wait(SOON) == 75, launched.printed
    step = checkpoint(tmp_path)["step"]
    assert 0 < step < 12
    assert tells(launched.printed, "stopped", "step", f"{step}", "SIGTERM")
    ranks = group(2, *command, folder=tmp_path)
    ranks[0].wait_until(lambda: step + 1 in steps_logged(tmp_path))
    ranks[1].send(signal.SIGUSR1)
    assert [rank.wait(SOON) for rank in ranks] == [75, 75], ranks[0].printed
    assert step < checkpoint(tmp_path)["step"] < 12
    assert tells(ranks[0].printed, "stopped", "step", f"{checkpoint(tmp_path)['step']}")
    done = run_group(2, *command)
    assert done.returncode == 0, done.stderr
    assert_same_end(straight, tmp_path)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, lambda launched: launched.agent),
        (signal.SIGINT, lambda launched: launched.agent and has_loaded(launched.agent, "libtorch_cpu.so")),
        (signal.SIGUSR1, lambda launched: launched.workers),
        (signal.SIGTERM, lambda launched: any(has_loaded(pid, "libtorch_cpu.so") for pid in launched.workers)),
    ],
    ids=["torchrun is started", "it imports torch", "its first process is started", "that imports torch"],
)
def test_a_signal_before_anybody_can_save(image_root, tmp_path, number, moment):
    launched = Launched(tmp_path, *small_run(image_root, tmp_path))
    launched.wait_until(lambda: moment(launched), every=0.002)
    os.kill(launched.process.pid, number)
    assert launched.wait(SOON) == 75, launched.printed
    assert "KeyboardInterrupt" not in launched.printed
    assert not (tmp_path / "run").exists()


def test_a_stop_of_one_of_two_launchers_ends_both(image_root, tmp_path):
    """Two nodes on loopback; the one that is not told would wait five minutes for the other's torchrun."""
    port = free_port()
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", *meeting]
    command = small_run(image_root, tmp_path, "schedule.epochs=100")
    first = Launched(tmp_path, *command, nodes=nodes, name="output_0")
    first.wait_until(lambda: is_open(port))  # it is the one whose torchrun the other one's meets
    second = Launched(tmp_path, *command, nodes=nodes, name="output_1")
    first.wait_until_step(2)
    os.kill(second.process.pid, signal.SIGTERM)
    asked = time.monotonic()
    assert [first.wait(), second.wait()] == [75, 75], first.printed + second.printed
    assert time.monotonic() - asked < 60
    assert "stopped" in first.printed + second.printed


def is_open(port: int) -> bool:
    with socket.socket() as other:
        return other.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_killed_process_is_restarted_with_the_others_and_nothing_differs(straight, image_root, tmp_path):
    launched = Launched(tmp_path, *small_run(image_root, tmp_path, "checkpoint.every_steps=1"))
    launched.wait_until_step(5)
    os.kill(launched.workers[0], signal.SIGKILL)
    assert launched.wait() == 0, launched.printed
    assert "another process of the run has ended" in launched.printed
    assert "resuming" in launched.printed
    assert_same_end(straight, tmp_path)


def test_processes_end_when_their_launcher_is_killed(image_root, tmp_path):
    launched = Launched(tmp_path, *small_run(image_root, tmp_path, "schedule.epochs=100"))
    launched.wait_until_step(2)
    workers = launched.workers
    os.kill(launched.agent, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    launched.wait()
    assert checkpoint(tmp_path)["step"] >= 2  # as after any SIGTERM


def test_a_process_that_hangs_ends_the_run_within_the_timeout(image_root, tmp_path):
    command = small_run(image_root, tmp_path, "schedule.epochs=100", "trainer.timeout_minutes=0.1")
    launched = Launched(tmp_path, *command, MAX_RESTARTS="0")
    launched.wait_until_step(2)
    os.kill(launched.workers[1], signal.SIGSTOP)
    stopped = launched.workers[1]
    launched.wait_until(lambda: "did not answer within 0.1 min" in launched.printed, timeout=30)
    os.kill(stopped, signal.SIGKILL)
    assert launched.wait() == 1


def test_a_time_limit_is_no_failure_to_restart(image_root, tmp_path):
    launched = Launched(tmp_path, *small_run(image_root, tmp_path, "trainer.max_time=0.00001"))
    assert launched.wait() == 75, launched.printed
    assert checkpoint(tmp_path)["step"] == 2  # agreed on one step late
    assert launched.printed.count("run folder") == 1


def test_a_mistake_is_printed_once_and_not_tried_again(image_root, tmp_path):
    launched = Launched(tmp_path, *small_run(image_root, tmp_path, "optimizer.lrr=1"))
    assert launched.wait() == 2, launched.printed
    assert launched.printed.count("error: there is no key optimizer.lrr") == 1
    assert "Traceback" not in launched.printed


def test_a_process_that_always_dies_is_not_restarted_for_ever(tmp_path):
    """Killed before it does anything, so that there is no progress: one start and MAX_RESTARTS more."""
    script = tmp_path / "dies.sh"
    script.write_text(f"echo started >> {tmp_path}/starts; sleep 0.2; kill -9 $$\n")
    launched = Launched(tmp_path, "--no-python", "bash", str(script), MAX_RESTARTS="2")
    assert launched.wait() == 1
    assert (tmp_path / "starts").read_text().count("started") == 3 * 2
    assert tells(launched.printed, "exitcode", "-9")


def test_torchrun_bears_an_outage_as_long_as_the_processes_do(tmp_path):
    """It ends a run whose store does not answer for 60 s, unless it is told otherwise; the last word is the user's."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$@"\n')
    python.chmod(0o755)
    own = ("--rdzv-conf", "read_timeout=5")
    launched = Launched(tmp_path, "train.py", nodes=own, PYTHON=str(python))
    assert launched.wait() == 0
    ours, users = launched.printed.split("--rdzv-conf")[1:]
    assert ours.split()[0] == "read_timeout=600"
    assert users.split() == ["read_timeout=5", "train.py"]


def test_a_process_that_does_not_end_when_it_is_told_is_killed(tmp_path):
    script = tmp_path / "deaf.sh"
    script.write_text(f"trap '' TERM; touch {tmp_path}/$LOCAL_RANK; while :; do sleep 0.1; done\n")
    launched = Launched(tmp_path, "--no-python", "bash", str(script), SHUTDOWN_SECONDS="2")
    launched.wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    workers = launched.workers
    launched.process.terminate()
    assert launched.wait(30) == 75, launched.printed
    assert not any(is_running(pid) for pid in workers)


def test_restarts_that_would_not_come_back_are_refused(image_root, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--max-restarts", "1"]
    done = run_python(*launcher, *small_run(image_root, tmp_path))
    assert done.returncode != 0
    assert tells(done.stderr, "--max-restarts", "1")
    assert "scripts/launch.sh" in done.stderr


def test_processes_with_other_data_are_found_at_the_start(image_root, tmp_path):
    """One of them sees another folder, as on a node with an incomplete copy."""
    other = tmp_path / "other"
    for split in ("train", "val"):
        for folder in sorted((image_root / split).iterdir()):
            (other / split / folder.name).mkdir(parents=True)
            for image in folder.iterdir():
                (other / split / folder.name / image.name).symlink_to(image)
    next((other / "val" / "class_2").iterdir()).unlink()
    script = tmp_path / "on_each_node.sh"
    script.write_text(f'[ $LOCAL_RANK = 1 ] && extra=data.root={other}\nexec {sys.executable} "$@" $extra\n')
    launched = Launched(tmp_path, "--no-python", "bash", str(script), *small_run(image_root, tmp_path))
    assert launched.wait() == 2, launched.printed
    assert tells(launched.printed, "val", "images", "rank", "1", "2", "0")
    assert not (tmp_path / "run").exists()

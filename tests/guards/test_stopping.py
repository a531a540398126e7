"""Time limits as people write them, and signals in small processes that import nothing heavy."""

import os
import signal
import subprocess
import sys
import time

import pytest

from contextual_cnn.errors import UserError
from contextual_cnn.guards.stopping import StopRequest
from contextual_cnn.settings.trainer import TrainerSettings
from tests.helpers.facts import tells

pytestmark = pytest.mark.run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PREPARED = """
import hashlib, os, signal, sys, time
from contextual_cnn.guards import stopping
assert "torch" not in sys.modules
stopping._PATIENCE = 0.5
stopping.end_when_asked()
print("ready", flush=True)
"""


@pytest.mark.parametrize(
    ("written", "seconds"),
    [(None, None), ("3:50:00", 13800), ("3:50", 13800), ("0:00:30", 30), (2, 7200), (0.5, 1800)],
)
def test_time_limits(written, seconds):
    assert TrainerSettings(max_time=written).max_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("written", [0, -1, "1:75", "soon", "", 13800, "0:00"])
def test_what_is_no_time_limit(written):
    with pytest.raises(UserError, match=r"trainer.max_time=3:50:00"):
        TrainerSettings(max_time=written)


def test_the_limit_is_a_reason_to_stop():
    assert StopRequest().reason is None
    assert StopRequest(1000).reason is None
    assert StopRequest(0).reason == "trainer.max_time is over"


class Script:
    """A python of its own that has called `end_when_asked`, and then does this.

    Args:
        hang_up: what it does at first about SIGHUP. It would inherit that from the tests, and under nohup ignore it.
    """

    def __init__(self, then: str, hang_up=signal.SIG_DFL, **environment: str) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREPARED + then],
            env={**clean, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),
        )
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> tuple[int, str]:
        """Exit status, and what was printed."""
        try:
            printed, complaints = self.process.communicate(timeout=20)
        finally:
            self.process.kill()
        return self.process.returncode, printed + complaints


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_the_first_step_ends_the_process_at_once(number):
    script = Script("time.sleep(60)")
    script.process.send_signal(number)
    status, printed = script.end()
    assert status == 75
    assert number.name in printed
    assert "Traceback" not in printed


LONG = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes, in C
LOCKED = "sum(range(10**8))"  # seconds, in C, and no other thread gets the interpreter


@pytest.mark.parametrize("native", [LONG, LOCKED], ids=["", "holding the interpreter"])
def test_a_native_call_does_not_keep_it(native):
    script = Script(f"{native}; time.sleep(60)")
    time.sleep(0.1)
    script.process.terminate()
    assert script.end()[0] == 75


def test_the_launcher_reads_the_status_in_its_file(tmp_path):
    script = Script("time.sleep(60)", CONTEXTUAL_CNN_STATUS_FILE=str(tmp_path / "status"))
    script.process.terminate()
    assert script.end()[0] == 0
    assert (tmp_path / "status").read_text() == "75"


def test_a_hang_up_is_ignored_under_nohup():
    script = Script("time.sleep(60)", hang_up=signal.SIG_IGN)
    script.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert script.process.poll() is None
    script.process.terminate()
    assert script.end()[0] == 75


def test_the_first_step_has_some_seconds_and_no_more():
    script = Script(f"with stopping.StopRequest() as request:\n    print('open', flush=True)\n    {LONG}")
    assert script.process.stdout.readline() == "open\n"
    script.process.terminate()
    assert script.end()[0] == 75


def test_what_has_not_been_saved_is_waited_for_and_what_comes_after_it_is_not():
    loop = """
with stopping.StopRequest() as request:
    request.protect()
    print("open", flush=True)
    while request.reason is None:
        time.sleep(0.01)
    time.sleep(2)
    print("saved after", request.reason, flush=True)
time.sleep(60)
"""
    script = Script(loop)
    assert script.process.stdout.readline() == "open\n"
    script.process.send_signal(signal.SIGUSR1)
    status, printed = script.end()
    assert status == 75
    assert tells(printed, "SIGUSR1")


def test_signals_of_a_forked_child_are_its_own():
    fork = """
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
print("child", os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
time.sleep(1)
"""
    status, printed = Script(fork).end()
    assert status == 0, printed
    assert printed == f"child {signal.SIGTERM.value}\n"

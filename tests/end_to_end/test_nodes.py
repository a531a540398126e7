"""Several nodes, each with a name, an address and a launcher of its own, that die, are cut off, or are slow.

The nodes are namespaces of this machine (`helpers/namespaces.py`); they need the right to make some.
"""

import os
import signal
import time
from contextlib import suppress

import pytest

from tests.conftest import small_run
from tests.helpers.endings import assert_same_end, checkpoint, losses, steps_logged
from tests.helpers.facts import tells
from tests.helpers.kills import smallest_run
from tests.helpers.launched import Launched, descendants
from tests.helpers.namespaces import Nodes, refusal
from tests.helpers.overrides import CROPS_ALONE
from tests.helpers.quick_start import group, run
from tests.helpers.slurm import SlurmJob

REFUSAL = refusal()
pytestmark = [
    pytest.mark.run,
    pytest.mark.slow,
    pytest.mark.skipif(REFUSAL is not None, reason=f"no network namespaces here: {REFUSAL}"),
]

SHORT = "trainer.timeout_minutes=0.1"
LOST = "another process of the run has ended"


@pytest.fixture
def nodes(request, tmp_path):
    with Nodes(getattr(request, "param", 2), tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def straight(image_root, tmp_path_factory):
    """Two processes of one node that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    ranks = group(2, *smallest_run(image_root, folder), folder=folder)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].printed
    return folder


class Run:
    """One run, of which each node has one process."""

    def __init__(self, nodes, folder, *command, **environment):
        self._nodes, self._folder, self._command, self._environment = nodes, folder, command, environment
        self.launched = [self.start(i) for i in range(len(nodes.names))]

    def start(self, i):
        """The same command on a node, as the README has it."""
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self._nodes.names[0]}:29500"]
        options = ["--nnodes", f"{len(self._nodes.names)}", "--nproc-per-node", "1", *meeting]
        starts = len(list(self._folder.glob(f"output_{i}_*")))
        place = dict(nodes=options, name=f"output_{i}_{starts}", through=self._nodes.through(i))
        return Launched(self._folder, *self._command, **place, **self._environment)

    def start_again(self, *places):
        for i in places:
            self.launched[i] = self.start(i)

    def wait(self):
        return [launched.wait() for launched in self.launched]

    @property
    def printed(self):
        """Of all starts on all nodes."""
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("output_*")))


@pytest.mark.parametrize("nodes", [2, 4], indirect=True)
def test_nodes_train_as_one_process(nodes, image_root, tmp_path):
    """The same micro-batches, crops and mixing; only the order of float32 sums differs."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    shared.mkdir()
    overrides = [*CROPS_ALONE, "trainer.micro_batch_size=4", "trainer.norm_batch=4", "schedule.epochs=2"]
    status, printed = run(*small_run(image_root, alone, *overrides), output=tmp_path / "alone_output")
    assert status == 0, printed
    several = Run(nodes, shared, *small_run(image_root, shared, *overrides))
    assert several.wait() == [0] * len(nodes.names), several.printed
    assert tells(several.printed, "4", "images", f"{len(nodes.names)}", "processes")
    assert steps_logged(shared) == [1, 2, 3, 4, 5, 6]
    assert trained(shared) == pytest.approx(trained(alone), rel=1e-4)


def trained(folder):
    return [loss for _, loss, *_ in losses(folder) if loss is not None]


def test_a_node_that_dies_is_waited_for_until_it_is_back(straight, nodes, image_root, tmp_path):
    several = Run(nodes, tmp_path, *smallest_run(image_root, tmp_path))
    several.launched[0].wait_until_step(5)
    nodes.kill(1)
    assert several.launched[1].wait() == -signal.SIGKILL
    several.launched[0].wait_until(lambda: LOST in several.printed)
    assert tells(several.printed, "rank", "0", "training", "step")
    nodes.boot(1)
    several.start_again(1)
    assert several.wait() == [0, 0], several.printed
    assert_same_end(straight, tmp_path)


def test_the_node_where_all_meet_dies_and_the_same_command_everywhere_resumes(straight, nodes, image_root, tmp_path):
    several = Run(nodes, tmp_path, *smallest_run(image_root, tmp_path))
    several.launched[0].wait_until_step(5)
    nodes.kill(0)
    assert several.launched[1].wait() == 1, several.printed
    assert tells(several.printed, "status", "1", "node1")
    assert LOST in several.printed
    nodes.boot(0)
    several.start_again(0, 1)
    assert several.wait() == [0, 0], several.printed
    assert "resuming" in several.printed
    assert_same_end(straight, tmp_path)


def test_a_node_that_is_cut_off_ends_the_run_within_the_timeout(straight, nodes, image_root, tmp_path):
    """Nobody is told that the cable is out. Then it is put right, and the same command goes on."""
    several = Run(nodes, tmp_path, *smallest_run(image_root, tmp_path, SHORT), MAX_RESTARTS="0", SHUTDOWN_SECONDS="1")
    several.launched[0].wait_until_step(5)
    nodes.cut_off(1)
    for launched in several.launched:
        launched.wait_until(lambda launched=launched: LOST in launched.printed, timeout=30)
        assert tells(launched.printed, "training", "step", "answer", "0.1", "min")
    assert several.launched[0].wait() == 1
    os.kill(several.launched[1].launcher, signal.SIGTERM)  # its torchrun waits until TCP gives up
    assert several.launched[1].wait() == 75
    nodes.reconnect(1)
    several.start_again(0, 1)
    assert several.wait() == [0, 0], several.printed
    assert_same_end(straight, tmp_path)


def test_a_node_that_is_cut_off_for_a_second_costs_nothing(straight, nodes, image_root, tmp_path):
    several = Run(nodes, tmp_path, *smallest_run(image_root, tmp_path), MAX_RESTARTS="0")
    several.launched[0].wait_until_step(5)
    nodes.cut_off(1)
    time.sleep(1)
    nodes.reconnect(1)
    assert several.wait() == [0, 0], several.printed
    assert_same_end(straight, tmp_path)


def test_a_node_that_comes_back_after_the_timeout_is_restarted_with_the_others(straight, nodes, image_root, tmp_path):
    several = Run(nodes, tmp_path, *smallest_run(image_root, tmp_path, SHORT))
    several.launched[0].wait_until_step(5)
    nodes.cut_off(1)
    for launched in several.launched:
        launched.wait_until(lambda launched=launched: LOST in launched.printed, timeout=30)
    nodes.reconnect(1)
    assert several.wait() == [0, 0], several.printed
    assert "resuming" in several.printed
    assert_same_end(straight, tmp_path)


def test_a_slow_node_changes_nothing(straight, nodes, image_root, tmp_path):
    """Late packets, where the kernel can make them late; and torchrun and its process stand still again and again."""
    several = Run(nodes, tmp_path, *smallest_run(image_root, tmp_path), MAX_RESTARTS="0")
    several.launched[0].wait_until_step(2)
    nodes.delay(1, milliseconds=20)
    launcher = several.launched[1].launcher
    while several.launched[0].process.poll() is None:
        slow = descendants(launcher)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in slow:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.2)
    assert several.wait() == [0, 0], several.printed
    assert_same_end(straight, tmp_path)


def test_a_slurm_job_on_two_nodes_is_stopped_and_goes_on(straight, nodes, image_root, tmp_path):
    """scripts/cluster/train.sbatch, whose srun runs the command on each node and passes USR1 on to it."""
    job = SlurmJob(tmp_path, nodes.names, [nodes.through(i) for i in range(2)])
    _, *overrides = smallest_run(image_root, tmp_path)
    started = job.start(*overrides)
    deadline = time.monotonic() + 60
    while 3 not in steps_logged(tmp_path):
        assert time.monotonic() < deadline, job.printed
        time.sleep(0.02)
    os.kill(started.pid, signal.SIGUSR1)
    assert started.wait(60) == 75, job.printed
    assert job.requeued == [job.number]
    assert 3 <= checkpoint(tmp_path)["step"] < 24
    assert job.start(*overrides).wait(60) == 0, job.printed
    assert_same_end(straight, tmp_path)

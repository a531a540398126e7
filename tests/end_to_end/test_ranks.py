"""Two processes of one run, of which one fails, hangs, never comes, or sees something else."""

import contextlib
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

from contextual_cnn.distributed import process_group
from contextual_cnn.errors import UserError
from tests.conftest import HAS_COMPILER, small_run
from tests.helpers import quick_start
from tests.helpers.endings import checkpoint
from tests.helpers.facts import tells
from tests.helpers.kills import smallest_run
from tests.helpers.quick_start import Command, group, run

pytestmark = pytest.mark.run


@pytest.fixture
def images(image_root, tmp_path):
    """A copy to do damage in. Of the val split rank 1 takes the second image of 18, the fourth, and so on."""
    return shutil.copytree(image_root, tmp_path / "images")


def test_a_rank_that_fails_alone_says_why(images, tmp_path):
    (images / "val" / "class_0" / "1.JPEG").write_bytes(b"<html>404 not found</html>" * 50)
    ranks = group(2, *smallest_run(images, tmp_path, "data.on_bad_image=stop"), folder=tmp_path)
    assert [rank.wait() for rank in ranks] == [1, 2]
    assert tells(ranks[1].printed, "val/class_0/1.JPEG")
    assert tells(ranks[1].printed, "rank", "1")
    assert tells(ranks[0].printed, "rank", "0", "evaluation", "step", "3")
    assert "Traceback" not in ranks[0].printed + ranks[1].printed


def test_a_rank_that_hangs_shows_its_stacks_and_the_others_end(images, tmp_path):
    """A file that does not answer: a named pipe that nobody writes to, put there when the files have been listed."""
    ranks = group(2, *smallest_run(images, tmp_path, "trainer.timeout_minutes=0.1"), folder=tmp_path)
    ranks[0].wait_until(lambda: "run folder" in ranks[0].printed)
    image = images / "val" / "class_0" / "1.JPEG"
    image.unlink()
    os.mkfifo(image)
    assert ranks[0].wait() == 1
    assert tells(ranks[0].printed, "rank", "0", "evaluation", "step", "3")
    assert tells(ranks[0].printed, "answer", "0.1")
    ranks[1].wait_until(lambda: "its stacks follow" in ranks[1].printed and "reader.py" in ranks[1].printed)
    assert re.search(r"rank 1 .* evaluation after step 3 for \d+ s", ranks[1].printed)
    assert "its stacks follow" not in ranks[0].printed.split("error: ")[0]
    ranks[1].process.kill()


def test_a_rank_that_never_comes_is_waited_for_as_long_as_set(image_root, tmp_path):
    port = str(quick_start.free_port())
    place = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    command = smallest_run(image_root, tmp_path, "trainer.timeout_minutes=0.05")
    alone = Command(*command, output=tmp_path / "output", **place)
    assert alone.wait(60) == 1
    error = next(line for line in alone.printed.splitlines() if line.startswith("error: "))
    assert [fact for fact in ("rank 0", "2 processes", f"127.0.0.1:{port}", "0.05 min") if fact not in error] == []
    assert tells(alone.printed, "1/2")
    assert "Traceback" not in alone.printed


def test_a_port_where_something_else_listens_is_named(image_root, tmp_path):
    """It takes the connection and is silent, which torch alone waits for without end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        place = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        command = smallest_run(image_root, tmp_path, "trainer.timeout_minutes=0.05")
        alone = Command(*command, output=tmp_path / "output", **place)
        assert alone.wait(60) == 1
    assert tells(alone.printed, f"127.0.0.1:{port}", "0.05")
    assert "Traceback" not in alone.printed


def test_strangers_at_every_open_port_change_nothing(image_root, tmp_path):
    ranks = group(2, *smallest_run(image_root, tmp_path, "schedule.epochs=2"), folder=tmp_path)
    ranks[0].wait_until(lambda: "run folder" in ranks[0].printed)
    ports = {port for rank in ranks for port in listening(rank.process.pid)}
    assert ports
    while ranks[0].process.is_alive():
        for port in ports:
            with socket.socket() as stranger:
                stranger.settimeout(1)
                if stranger.connect_ex(("127.0.0.1", port)) == 0:
                    with contextlib.suppress(OSError):
                        stranger.sendall(os.urandom(1000))
        ranks[0].process.join(0.2)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].printed


def listening(pid: int) -> set[int]:
    """The TCP ports on which a process accepts connections."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in sockets}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (dict(WORLD_SIZE="two"), "WORLD_SIZE=two"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE=0"),
        (dict(RANK="x", WORLD_SIZE="2"), "RANK=x"),
        (dict(RANK="-1", WORLD_SIZE="2"), "RANK=-1"),
        (dict(RANK="5", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"), "RANK=5"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_PORT="1"), "MASTER_ADDR"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"), "MASTER_PORT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_environment_that_describes_no_group_is_refused(monkeypatch, environment, named):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused, process_group("cpu", timeout_minutes=0.01):
        pass
    assert named in refused.value.cause
    assert "launch.sh" in refused.value.fix


def test_a_wrong_number_of_processes_is_printed_as_any_mistake(image_root, tmp_path):
    status, printed = run(*smallest_run(image_root, tmp_path), output=tmp_path / "output", WORLD_SIZE="two")
    assert status == 2, printed
    assert "error: WORLD_SIZE=two" in printed
    assert "Traceback" not in printed


@pytest.mark.skipif(not HAS_COMPILER, reason="without a C++ compiler both take plain torch")
def test_ranks_whose_convolutions_are_computed_otherwise_are_refused(image_root, tmp_path):
    ranks = group(
        2,
        *small_run(image_root, tmp_path),
        folder=tmp_path,
        environments={0: dict(CONTEXTUAL_CNN_OPS="auto"), 1: dict(CONTEXTUAL_CNN_OPS="torch")},
    )
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert tells(ranks[0].printed, "operators", "rank", "1", "2", "0")
    assert "CONTEXTUAL_CNN_OPS" in ranks[0].printed
    assert not (tmp_path / "run").exists()


def test_ranks_that_see_different_checkpoints_are_refused(image_root, tmp_path):
    """As on nodes that share no output folder: one of them has a run to go on from, the other one none."""
    shared = smallest_run(image_root, tmp_path, "trainer.max_steps=3")
    done = Command(*shared, output=tmp_path / "output")
    assert done.wait() == 0, done.printed
    before = checkpoint(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ranks = group(2, *shared, folder=tmp_path, per_rank={1: [f"output_dir={elsewhere}"]})
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert tells(ranks[0].printed, "configuration", "rank", "1", "2", "0")
    assert not (elsewhere / "run").exists()
    assert checkpoint(tmp_path)["step"] == before["step"]

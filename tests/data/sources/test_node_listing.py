"""A listing that one process of a node makes, and all of them hold once."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from contextual_cnn.data.sources.file_list import open_file_list
from contextual_cnn.data.sources.names import Names
from contextual_cnn.data.sources.node_listing import once_a_node
from contextual_cnn.data.sources.shared_arrays import SharedArrays
from contextual_cnn.data.sources.source import ImageFiles

TEXTS = ["a/b.jpg", "", "ü/漢字.png", b"\xff\xfe.jpg".decode("utf-8", "surrogateescape"), "tab\tnewline\n.jpg"]

RANK = """
import json, os, resource, sys
import numpy as np
from contextual_cnn.data.sources.node_listing import once_a_node
from contextual_cnn.data.sources.source import ImageFiles

def make():
    print("made")
    if len(sys.argv) > 1:
        raise SystemExit(sys.argv[1])
    images = ImageFiles("/root", ("a", "b"), [f"train/{i:06d}.jpg" for i in range(200_000)], np.arange(200_000) % 2)
    return images.shared()

images = once_a_node("train", os.environ.get("TEST_OF", ""), make)
mapped = [line for line in open("/proc/self/maps") if "contextual-cnn listing" in line]
print(len(images), images.paths[199_999], images.targets[199_999], len(mapped))
sys.stdin.read()  # the first process stays until the others have looked
"""


def test_names_come_back_as_they_were():
    names = Names.of(TEXTS)
    assert list(names) == TEXTS
    assert [names[i] for i in range(-5, 5)] == TEXTS + TEXTS
    assert names[1:3] == tuple(TEXTS[1:3])
    assert list(names.take([3, 0])) == [TEXTS[3], TEXTS[0]]
    assert len(Names.of([])) == 0
    with pytest.raises(IndexError):
        names[5]


def test_arrays_are_sent_without_being_copied():
    arrays = {"a": np.arange(10**6), "b": np.array([], dtype=np.int32), "c": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    shared = SharedArrays.of(arrays)
    sent = pickle.dumps(shared)
    assert len(sent) < 500
    again = pickle.loads(sent)
    for name, array in arrays.items():
        assert np.array_equal(again[name], array)
        assert again[name].dtype == array.dtype
        assert not again[name].flags.writeable


def test_memory_of_another_start_is_not_taken_for_ours():
    ours, others = SharedArrays.of({"a": np.zeros(3)}), SharedArrays.of({"a": np.ones(3)})
    with pytest.raises(OSError, match="not the memory"):
        SharedArrays((os.getpid(), others._descriptor), ours._token, ours._layout)


def test_a_source_that_is_sent_to_a_worker_is_the_same(tmp_path):
    images = ImageFiles(tmp_path, ("a", "b"), [f"{i}.jpg" for i in range(10_000)], np.arange(10_000) % 2)
    shared = images.shared()
    sent = pickle.dumps(shared)
    assert len(sent) < 2000 < len(pickle.dumps(images))
    again = pickle.loads(sent)
    assert again.paths == images.paths
    assert np.array_equal(again.targets, images.targets)
    assert (again.root, again.classes, again.not_read) == (images.root, images.classes, images.not_read)
    assert len(again.take([1, 2])) == 2


@pytest.fixture
def node(tmp_path):
    """Starts a process of a node, by its local rank; what it prints is read from it."""
    started = []

    def start(local_rank: int, *arguments: str, **more: str) -> subprocess.Popen:
        place = dict(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE="3", MASTER_PORT="1", TMPDIR=str(tmp_path))
        environment = {**os.environ, **place, **more, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.run
def test_the_processes_of_a_node_hold_it_once(node, tmp_path):
    others = [node(1), node(2)]
    first = node(0)
    assert first.stdout.readline() == "made\n"
    for process in (first, *others):
        assert process.stdout.readline() == "200000 train/199999.jpg 1 1\n"
    (note,) = (tmp_path / f"contextual_cnn_{os.getuid()}").glob("listing_*")
    assert note.stat().st_size < 2000
    # Those of the next start do not take what this one left
    first.kill()
    first.wait()
    late = node(1)
    again = node(0)
    assert again.stdout.readline() == "made\n"
    assert late.stdout.readline() == "200000 train/199999.jpg 1 1\n"


@pytest.mark.run
def test_a_process_that_has_other_data_in_mind_makes_its_own(node):
    """The processes are compared later, and the one that differs is named."""
    first, other = node(0, TEST_OF="/data"), node(1, TEST_OF="/incomplete copy")
    assert first.stdout.readline() == other.stdout.readline() == "made\n"


@pytest.mark.run
def test_nobody_waits_for_a_first_process_that_has_ended_with_a_mistake(node, tmp_path):
    status = tmp_path / "status"
    status.write_text("")
    other = node(1, CONTEXTUAL_CNN_STATUS_FILE=str(status))
    time.sleep(0.5)
    status.write_text("2")
    assert other.stdout.readline() == "made\n"


@pytest.mark.run
def test_what_an_earlier_listing_of_the_same_start_has_left_is_waited_out(node):
    first = node(0, TEST_OF="/data")
    assert first.stdout.readline() == "made\n"
    assert first.stdout.readline().startswith("200000")
    other = node(1, TEST_OF="/other data")
    again = node(0, TEST_OF="/other data")
    assert again.stdout.readline() == "made\n"
    assert other.stdout.readline().startswith("200000")  # without having made it


@pytest.mark.run
def test_a_mistake_is_found_by_each(node):
    first, other = node(0, "5"), node(1, "5")
    assert [process.wait(60) for process in (first, other)] == [1, 1]
    assert [process.stdout.read() for process in (first, other)] == ["made\n", "made\n"]


def test_a_folder_where_others_may_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in dict(LOCAL_RANK="1", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / f"contextual_cnn_{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert once_a_node("train", "", lambda: "made here") == "made here"


def test_a_million_images_take_little_memory(tmp_path):
    """As many as ImageNet's in its own lengths: names 42 bytes, and 16 for where they end and the class."""
    count = 20_000
    (tmp_path / "train").mkdir()
    Path(tmp_path / "train/n00000000_0.JPEG").touch()
    lines = [f"train/n{i % 1000:08d}_{i}.JPEG {i % 1000}" for i in range(count)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    images = open_file_list(tmp_path, "train")
    assert sum(array.nbytes for array in images.arrays().values()) / count * 1_281_167 < 80 * 2**20

"""The store never holds up the run, never loses the last good checkpoint, and says what it did."""

import hashlib
import os
import random
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from contextual_cnn.errors import UserError
from contextual_cnn.runs import checkpoint_store
from contextual_cnn.runs.checkpoint import Manifest, load_checkpoint, step_of
from contextual_cnn.runs.checkpoint_store import CheckpointStore
from contextual_cnn.settings.checkpoint import CheckpointSettings
from tests.conftest import run_python
from tests.helpers.facts import tells


def state(step, weight=1.0):
    return {"model": {"w": torch.full((1000,), weight)}, "step": step}


def saved(folder, *steps):
    folder.mkdir(exist_ok=True)
    store = CheckpointStore(folder, CheckpointSettings())
    for step in steps:
        store.save(state(step))
    store.close()
    return store


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_last_previous_and_best(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointSettings())
    for step in (9, 10, 11):
        store.save(state(step), is_best=step == 10)
    store.close()
    assert {path.name: step_of(path) for path in tmp_path.iterdir()} == {
        "last.pt": 11,
        "previous.pt": 10,
        "best.pt": 10,
    }
    assert store.newest()[1]["step"] == 11


def test_the_state_that_is_written_is_the_one_at_the_call(tmp_path, monkeypatch):
    go_on = threading.Event()
    write = checkpoint_store.write_checkpoint
    monkeypatch.setattr(checkpoint_store, "write_checkpoint", lambda *a: (go_on.wait(), write(*a)))
    store, live = CheckpointStore(tmp_path, CheckpointSettings()), state(1)
    store.save(live)  # returns although nothing can be written yet
    live["model"]["w"].fill_(2.0)
    assert not store.last.exists()
    go_on.set()
    store.close()
    assert torch.equal(load_checkpoint(store.last)["model"]["w"], torch.ones(1000))


def test_a_best_state_is_written_once_under_two_names(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointSettings())
    store.save(state(1), is_best=True)
    store.wait()
    assert os.path.samefile(store.last, store.best)
    store.save(state(2))
    store.close()
    assert [step_of(path) for path in (store.last, store.previous, store.best)] == [2, 1, 1]
    assert os.path.samefile(store.previous, store.best)


def test_a_kill_before_last_has_its_name_leaves_best_as_the_newest(tmp_path, monkeypatch):
    store = saved(tmp_path, 1)
    replaced = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda path, target: None if path.name == "last.tmp" else replaced(path, target)
    )
    store.save(state(2), is_best=True)
    store.wait()
    path, found = CheckpointStore(tmp_path, CheckpointSettings()).newest()
    assert (path.name, found["step"]) == ("best.pt", 2)


def test_a_file_system_without_links_gets_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError))
    store = CheckpointStore(tmp_path, CheckpointSettings())
    store.save(state(1), is_best=True)
    store.save(state(2))
    store.close()
    assert [step_of(path) for path in (store.last, store.previous, store.best)] == [2, 1, 1]


def test_a_best_state_does_not_wait_for_a_write(tmp_path, monkeypatch):
    go_on = threading.Event()
    write = checkpoint_store.write_checkpoint
    monkeypatch.setattr(checkpoint_store, "write_checkpoint", lambda *a: (go_on.wait(), write(*a)))
    store = CheckpointStore(tmp_path, CheckpointSettings(every_steps=1))
    assert store.can_afford()
    store.save(state(1))
    assert not store.can_afford()
    assert not store.is_due(2)
    for step in (2, 3):  # the second one takes the place of the first
        store.save(state(step), is_best=True)
    assert not store.last.exists()
    go_on.set()
    store.wait()
    assert store.is_due(4)
    store.save(state(4))
    store.close()
    assert [step_of(path) for path in (store.last, store.previous, store.best)] == [4, 3, 3]


def test_copies_take_the_same_memory_again(tmp_path):
    store, live = CheckpointStore(tmp_path, CheckpointSettings()), state(1)
    live["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(8, 4, 2, 2).to(memory_format=torch.channels_last)}}}
    store.save(live)
    store.wait()
    (spare,) = store._spare
    before = spare.state["model"]["w"].data_ptr()
    live["model"]["w"].fill_(5.0)
    store.save(live | {"step": 2})
    store.close()
    assert [spare] == store._spare
    assert spare.state["model"]["w"].data_ptr() == before
    assert load_checkpoint(store.last)["model"]["w"][0] == 5
    assert load_checkpoint(store.previous)["model"]["w"][0] == 1
    moments = load_checkpoint(store.last)["optimizer"]["state"][0]["exp_avg"]
    assert moments.is_contiguous(memory_format=torch.channels_last)


def test_saves_that_cost_too_much_of_the_time_are_left_out(tmp_path, monkeypatch):
    """Of epochs of two seconds whose copies take half a second."""
    now = 1000.0
    monkeypatch.setattr(checkpoint_store.time, "monotonic", lambda: now)
    store = CheckpointStore(tmp_path, CheckpointSettings())
    to_cpu = checkpoint_store._to_cpu

    def slow(*arguments):
        nonlocal now
        now += 0.5 if arguments[0] is live else 0.0
        return to_cpu(*arguments)

    monkeypatch.setattr(checkpoint_store, "_to_cpu", slow)
    spent, epochs = 0.0, 100
    for epoch in range(epochs):
        now += 2
        if store.can_afford():
            live, before = state(epoch), now
            store.save(live)
            store.wait()
            spent += now - before
    assert 0 < spent < 0.03 * (2 * epochs)  # 1 %, and the first, whose cost nobody knew
    assert store.newest()[1]["step"] > 50


def test_a_damaged_file_is_passed_over_aloud_and_never_replaces_a_good_one(tmp_path, caplog):
    store = saved(tmp_path, 1, 2, 3)
    damage(store.last)
    again = CheckpointStore(tmp_path, CheckpointSettings())
    path, found = again.newest()
    assert (path, found["step"]) == (store.previous, 2)
    assert tells(caplog.text, "last.pt", "damaged", "SHA-256")
    again.save(state(4))
    again.close()
    assert (step_of(store.last), step_of(store.previous)) == (4, 2)  # not the damaged one of step 3


def test_all_files_damaged_is_an_error_and_no_fresh_start(tmp_path):
    store = saved(tmp_path, 1, 2)
    assert CheckpointStore(tmp_path / "empty", CheckpointSettings()).newest() is None
    damage(store.last)
    store.previous.write_bytes(b"")
    with pytest.raises(UserError, match=r"previous\.pt.*last\.pt"):
        CheckpointStore(tmp_path, CheckpointSettings()).newest()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("/nowhere/at/all",)


def pickle_that_runs(path):
    write_whole({"format": 1, "model": Payload()}, path, step=99)


def write_whole(content, path, step):
    """Anything, with a manifest that fits it."""
    torch.save(content, path)
    data = path.read_bytes()
    path.write_bytes(data + Manifest(len(data), hashlib.sha256(data).hexdigest(), step).line())


UNUSABLE = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),  # at most 108 letters
    "a file that gives EIO": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pickle that wants to run code": pickle_that_runs,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_whatever_cannot_be_read_is_named_and_the_next_older_one_used(tmp_path, caplog, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    store = saved(tmp_path, 1, 2, 3)
    store.last.unlink()
    UNUSABLE[kind](store.last)
    again = CheckpointStore(tmp_path, CheckpointSettings())
    path, found = again.newest()
    assert (path, found["step"]) == (store.previous, 2)
    assert str(store.last) in caplog.text
    again.save(state(4))
    again.close()
    assert (step_of(store.last), step_of(store.previous)) == (4, 2)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_run_whose_only_checkpoint_cannot_be_read_does_not_start_from_zero(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore(tmp_path, CheckpointSettings())
    UNUSABLE[kind](store.last)
    with pytest.raises(UserError) as refused:
        store.newest()
    assert str(store.last) in refused.value.cause
    assert "run_name=" in refused.value.fix


def test_a_checkpoint_of_a_later_version_is_not_left_out(tmp_path):
    """Or the next save would replace it by an older state."""
    store = saved(tmp_path, 1, 2)
    write_whole(load_checkpoint(store.last) | {"format": 99}, store.last, step=2)
    with pytest.raises(UserError, match="format 99"):
        CheckpointStore(tmp_path, CheckpointSettings()).newest()


def test_whatever_happens_the_newest_whole_file_is_found(tmp_path):
    """Random saves, damage to the newest, half-written files and restarts, while one whole file is left."""
    draw = random.Random(0)
    store, step, fell_back = CheckpointStore(tmp_path, CheckpointSettings()), 0, 0
    for _ in range(120):
        event = draw.choice(["save", "save", "best", "damage", "killed in a write"])
        whole = {path: step_of(path) for path in tmp_path.glob("*.pt") if is_whole(path)}
        if event in ("save", "best"):
            step += 1
            store.save(state(step), is_best=event == "best")
            store.close()
            assert not list(tmp_path.glob("*.tmp"))
        elif event == "killed in a write":
            (tmp_path / "last.tmp").write_bytes(b"half of a checkpoint")
        elif len({path.stat().st_ino for path in whole}) > 1:  # what is best may have two names
            damage(max(whole, key=whole.get))
            expected = max(whole[path] for path in whole if is_whole(path))
            store = CheckpointStore(tmp_path, CheckpointSettings())
            assert store.newest()[1]["step"] == expected
            fell_back += 1
    assert step > 20
    assert fell_back > 10


def is_whole(path):
    try:
        load_checkpoint(path)
    except UserError:
        return False
    return True


FULL_DISK = """
import os, resource, sys
from pathlib import Path
from contextual_cnn.errors import UserError
from contextual_cnn.runs.checkpoint_store import CheckpointStore
from contextual_cnn.settings.checkpoint import CheckpointSettings
from tests.conftest import run_python
from tests.runs.test_checkpoint_store import state
import logging
logging.basicConfig(format="%(message)s")
folder, before = Path(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))  # the signal is ignored by Python
store = CheckpointStore(folder, CheckpointSettings())
store.save(state(1))
store.wait()
try:
    store.close()
except UserError as error:
    print("refused", error.cause, os.listdir(folder))
resource.setrlimit(resource.RLIMIT_FSIZE, before)
store.save(state(2))
store.close()
"""


@pytest.mark.run
def test_a_full_disk_is_a_warning_then_tried_again(tmp_path):
    """At the end of a run it is an error. In a process of its own: no file of it may grow beyond a kilobyte."""
    done = run_python("-c", FULL_DISK, str(tmp_path))
    assert done.returncode == 0, done.stderr
    warning = done.stderr.splitlines()[0]
    assert "step 1" in warning
    assert "File too large" in warning  # the system's reason, not torch's "unexpected pos"
    assert "MiB free" in warning
    assert done.stdout.startswith("refused")
    assert done.stdout.endswith(" []\n")  # nothing is left behind
    assert step_of(tmp_path / "last.pt") == 2


def test_a_folder_that_is_gone_stops_nothing(tmp_path, caplog):
    store = CheckpointStore(tmp_path / "gone", CheckpointSettings())
    store.save(state(1))
    store.wait()
    assert "the folder is gone" in caplog.text


def test_too_little_room_is_foretold(tmp_path, monkeypatch, caplog):
    store = saved(tmp_path, 1)
    store.warn_of_little_room(state(2))
    assert caplog.text == ""
    monkeypatch.setattr(checkpoint_store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3000))
    large = {"model": {"w": torch.zeros(2**20)}}
    store.warn_of_little_room(large)
    assert tells(caplog.text, "16", "0", "MiB")


def test_a_left_over_that_cannot_be_removed_is_a_save_that_failed(tmp_path, caplog):
    store = saved(tmp_path, 1)
    (tmp_path / "last.tmp").mkdir()
    store.save(state(2))
    store.wait()
    assert tells(caplog.text, "step", "2")
    assert step_of(store.last) == 1
    (tmp_path / "last.tmp").rmdir()
    store.save(state(3))
    store.close()
    assert step_of(store.last) == 3


def test_only_what_a_save_leaves_behind_is_removed(tmp_path):
    tmp_path.joinpath("notes.tmp").write_text("mine")
    tmp_path.joinpath("x.tmp").mkdir()
    tmp_path.joinpath("best.tmp").write_bytes(b"half of a checkpoint")
    store = saved(tmp_path, 1)
    assert step_of(store.last) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "notes.tmp", "x.tmp"}


def test_a_link_in_the_place_of_the_file_that_is_written_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "last.tmp").symlink_to(victim)
    assert step_of(saved(run, 1).last) == 1
    assert victim.read_text() == "mine"


def test_the_files_own_times_say_nothing(tmp_path):
    store = saved(tmp_path, 1, 2)
    os.utime(store.previous, (2_000_000_000, 2_000_000_000))
    assert CheckpointStore(tmp_path, CheckpointSettings()).newest()[1]["step"] == 2


def test_a_folder_that_goes_in_mid_run_does_not_end_it(tmp_path, caplog):
    CheckpointStore(tmp_path / "gone", CheckpointSettings()).warn_of_little_room(state(1))
    assert str(tmp_path / "gone") in caplog.text


def test_a_link_is_named_and_its_target_left_alone(tmp_path, caplog):
    elsewhere = saved(tmp_path / "elsewhere", 5).last
    before = elsewhere.read_bytes()
    run = tmp_path / "run"
    run.mkdir()
    (run / "last.pt").symlink_to(elsewhere)
    store = CheckpointStore(run, CheckpointSettings())
    assert store.newest()[1]["step"] == 5
    assert tells(caplog.text, "last.pt", "link", f"{elsewhere}")
    for step in (6, 7):
        store.save(state(step))
    store.close()
    assert step_of(store.last) == 7
    assert not store.last.is_symlink()
    assert elsewhere.read_bytes() == before


def test_weights_that_are_not_finite_replace_nothing(tmp_path, caplog):
    store = saved(tmp_path, 1)
    store.save(state(2, weight=float("nan")))
    store.wait()
    assert tells(caplog.text, "finite", "w")
    assert step_of(store.last) == 1


def test_when_a_state_is_due(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoint_store.time, "monotonic", lambda: now)
    store = CheckpointStore(tmp_path, CheckpointSettings(every_steps=5, every_minutes=1))
    assert not store.is_due(4)
    assert store.is_due(5)
    store.save(state(5))
    store.close()
    assert not store.is_due(9)
    now += 61
    assert store.is_due(6)
    again = CheckpointStore(tmp_path, CheckpointSettings(every_steps=5, every_minutes=None))
    again.newest()
    assert not again.is_due(9)
    never = CheckpointStore(tmp_path / "gone", CheckpointSettings(every_minutes=None))
    never.save(state(1))
    never.wait()
    assert not never.is_due(10**6)
    now += 61
    assert never.is_due(2)  # because the last one failed
    with pytest.raises(UserError, match=r"checkpoint\.every_minutes"):
        CheckpointStore(tmp_path, CheckpointSettings(every_minutes=0))

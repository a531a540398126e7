"""One run, one folder, one process that writes there."""

import errno
import logging
import os

import pytest

from contextual_cnn.errors import UserError
from contextual_cnn.runs import run_folder
from contextual_cnn.runs.run_folder import RunFolder, start_logging


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path):
    run = RunFolder(tmp_path / "outputs" / "run")
    with run.claimed():
        assert (run.path / "lock").exists()
    assert not run.path.exists()
    with run.claimed():
        run.config.write_text("something")
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "lock"}


def test_the_second_is_told_who_has_it_and_gets_it_afterwards(tmp_path, caplog):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with first.claimed():
        first.config.write_text("something")
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "), second.claimed(patience=-1):
            pass
        assert (first.path / "lock").exists()
    with second.claimed():
        pass


def test_a_lock_that_was_removed_while_it_was_waited_for_does_not_count(tmp_path, monkeypatch):
    """The first ends and removes its empty folder between the second's look at the file and its lock on it."""
    first, second, lock = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run"), run_folder._try_to_lock
    claim = first.claimed()
    claim.__enter__()
    looks = []

    def first_ends_then_lock(descriptor):
        if not looks:
            claim.__exit__(None, None, None)
        looks.append(descriptor)
        return lock(descriptor)

    monkeypatch.setattr(run_folder, "_try_to_lock", first_ends_then_lock)
    with second.claimed(patience=5):
        monkeypatch.undo()
        assert (second.path / "lock").exists()
        with pytest.raises(UserError, match=r"process \d+"), RunFolder(second.path).claimed(patience=-1):
            pass
    assert len(looks) == 2


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), RunFolder(tmp_path / "run").claimed():
        pass
    assert "No locks available" in caplog.text


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
@pytest.mark.parametrize("name", ["lock", "train.log"])
def test_a_lock_or_a_log_that_is_not_a_file_is_refused(tmp_path, name, kind):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    path = run.path / name
    {"link": lambda: path.symlink_to(victim), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(UserError) as refused, run.claimed():
        run.prepare({"seed": 0})
    assert str(path) in refused.value.cause
    assert victim.read_text() == "mine"


def test_what_is_written_whole_takes_the_place_of_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for name in ("config.yaml", "environment.json"):
        (run.path / name).symlink_to(victim)
    with run.claimed():
        run.prepare({"seed": 0})
    assert victim.read_text() == "mine"
    assert run.config.read_text() == "seed: 0\n"
    assert not run.config.is_symlink()


@pytest.mark.parametrize(("is_main", "expected"), [(True, 3), (False, 1)])
def test_what_all_ranks_would_say_is_said_by_one(capsys, is_main, expected):
    start_logging(is_main)
    for module in ("runs.resume", "engine.trainer", "data.bad_images"):
        logging.getLogger(f"contextual_cnn.{module}").warning("something")
    assert capsys.readouterr().out.count("something") == expected

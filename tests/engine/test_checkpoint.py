"""Checkpoints: whole or not at all, and never trusted."""

import os

import pytest
import torch

from contextual_cnn.engine.checkpoint import CheckpointStore, find_checkpoint, load_checkpoint
from contextual_cnn.engine.resume import load_last
from contextual_cnn.errors import UserError


def state(**changes):
    config = {"data": {"root": "/a"}, "optimizer": {"lr": 0.1}, "trainer": {"log_every": 1}}
    return {
        "model": {"w": torch.ones(3)},
        "step": 7,
        "epoch": 1,
        "classes": ["a"],
        "images": 9,
        "config": config,
    } | changes


def test_round_trip_and_no_temporary_file_left(tmp_path):
    store = CheckpointStore(tmp_path)
    (tmp_path / "last.tmp").write_bytes(b"half of a checkpoint")
    store.save(state(), store.last)
    assert load_checkpoint(store.last)["step"] == 7
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(state(), store.last)

    def full_disk(_state, file):
        file.write(b"x" * 100)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="intact"):
        store.save(state(step=8), store.last)
    assert load_checkpoint(store.last)["step"] == 7
    assert os.listdir(tmp_path) == ["last.pt"]


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_files_that_are_no_checkpoints_are_refused_and_not_run(tmp_path):
    path, marker = tmp_path / "x.pt", tmp_path / "was_run"
    torch.save({"format": 1, "model": Payload(str(marker))}, path)
    whole = tmp_path / "whole.pt"
    CheckpointStore(tmp_path).save(state(), whole)
    contents = [path.read_bytes(), b"", b"text", whole.read_bytes()[:200], whole.read_bytes()[:-300]]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load_checkpoint(path)
    assert not marker.exists()
    torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(UserError, match="no checkpoint of this program"):
        load_checkpoint(path)
    torch.save(state(format=99), path)
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_a_run_folder_means_its_best_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        find_checkpoint(str(tmp_path))
    store = CheckpointStore(tmp_path / "checkpoints")
    store.folder.mkdir()
    store.save(state(), store.last)
    assert find_checkpoint(str(tmp_path)) == store.last
    store.save(state(), store.best)
    assert find_checkpoint(str(tmp_path)) == store.best
    assert find_checkpoint(str(store.last)) == store.last


def test_only_the_same_run_goes_on_unasked(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    config = state()["config"]
    assert load_last(store, config, ("a",), 9, "auto") is None
    store.save(state(), store.last)
    moved = config | {"data": {"root": "/b"}, "trainer": {"log_every": 50}}
    assert load_last(store, moved, ("a",), 9, "auto")["step"] == 7
    changed = config | {"optimizer": {"lr": 0.2}}
    with pytest.raises(UserError, match=r"optimizer.lr: 0.1 -> 0.2"):
        load_last(store, changed, ("a",), 9, "auto")
    with pytest.raises(UserError, match="training images: 9 -> 10"):
        load_last(store, config, ("a",), 10, "auto")
    assert load_last(store, changed, ("a",), 10, "anyway")["step"] == 7
    with pytest.raises(UserError, match="other classes"):
        load_last(store, config, ("b",), 9, "anyway")

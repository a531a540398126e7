"""Checkpoints: whole or not at all, and never trusted."""

import os
import random
import threading

import pytest
import torch

from contextual_cnn.errors import UserError
from contextual_cnn.runs.checkpoint import (
    DamagedCheckpoint,
    load_checkpoint,
    load_trained,
    map_checkpoint,
    step_of,
    write_checkpoint,
)
from contextual_cnn.runs.checkpoint_files import find_checkpoint
from contextual_cnn.runs.checkpoint_store import CheckpointStore
from contextual_cnn.settings.checkpoint import CheckpointSettings
from tests.helpers.hostile import compressed, write_bytes, write_whole


def state(**changes):
    return {"model": {"w": torch.ones(3)}, "step": 7} | changes


def test_a_file_that_torch_reads_too_and_no_temporary_one(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint(state(), path)
    assert load_checkpoint(path)["step"] == step_of(path) == 7
    assert torch.load(path, weights_only=True)["step"] == 7
    assert path.read_bytes().splitlines()[-1].startswith(b'contextual-cnn checkpoint {"bytes": ')
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_file_that_is_replaced_can_be_kept(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for step in (1, 2, 3):
        write_checkpoint(state(step=step), last, previous)
    assert (step_of(last), step_of(previous)) == (3, 2)


def test_whoever_reads_while_it_is_rewritten_gets_a_whole_file(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    write_checkpoint(state(step=0), last)
    writer = threading.Thread(
        target=lambda: [write_checkpoint(state(step=step), last, previous) for step in range(1, 100)]
    )
    writer.start()
    seen = [load_checkpoint(last)["step"]]
    while writer.is_alive():
        seen.append(load_checkpoint(last)["step"])
    assert seen == sorted(seen)
    assert len(set(seen)) > 5


def test_without_hard_links_the_replaced_file_is_kept_too(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError("this file system has no hard links")

    monkeypatch.setattr(os, "link", link)
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for step in (1, 2, 3):
        write_checkpoint(state(step=step), last, previous)
    assert (step_of(last), step_of(previous)) == (3, 2)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_checkpoint(state(), path)

    def full_disk(_state, file):
        file.write(b"x" * 100)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(RuntimeError):
        write_checkpoint(state(step=8), path)
    assert load_checkpoint(path)["step"] == 7
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_disk_that_fails_at_the_last_moment_costs_no_file(tmp_path, monkeypatch, failing):
    """EIO at the rename to last.pt, or when the file is made durable; the next write is an ordinary one."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for step in (1, 2):
        write_checkpoint(state(step=step), last, previous)
    works = getattr(os, failing)

    def fail(*arguments):
        if failing == "fsync" or arguments[1] == last:
            raise OSError(5, "Input/output error")
        works(*arguments)

    with monkeypatch.context() as disk:
        disk.setattr(os, failing, fail)
        with pytest.raises(OSError, match="Input/output error"):
            write_checkpoint(state(step=3), last, previous)
    assert (step_of(last), step_of(previous)) == (2, 1)
    write_checkpoint(state(step=4), last, previous)
    assert (step_of(last), step_of(previous)) == (4, 2)


def test_a_folder_that_cannot_be_made_durable_is_an_error_although_the_file_is_there(tmp_path, monkeypatch):
    last, works, calls = tmp_path / "last.pt", os.fsync, []

    def fail_for_the_folder(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        works(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_the_folder)
    with pytest.raises(OSError, match="Input/output error"):
        write_checkpoint(state(step=3), last)
    assert step_of(last) == 3


def test_what_could_not_be_loaded_again_is_not_kept(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint(state(), path)
    with pytest.raises(Exception, match="numpy"):
        write_checkpoint(state(best=torch.ones(1).numpy().sum()), path)
    assert load_checkpoint(path)["step"] == 7


def test_every_flipped_bit_and_every_missing_end_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint(state(), path)
    content = bytearray(path.read_bytes())
    draw = random.Random(0)
    in_the_manifest = range(8 * (len(content) - 150), 8 * len(content))
    for bit in [*draw.sample(range(8 * len(content)), 700), *draw.sample(in_the_manifest, 300)]:
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(path)
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedCheckpoint, match="no complete checkpoint"):
            load_checkpoint(path)
    path.write_bytes(content)
    assert load_checkpoint(path)["step"] == 7


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def whole_state():
    """As large as small: weights, their average, and two moments for each."""
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(500, generator=draw) for name in ("a", "b", "c")}
    moments = {
        i: {"exp_avg": w + 1, "exp_avg_sq": w + 2, "step": torch.tensor(7.0)} for i, w in enumerate(weights.values())
    }
    average = {name: w + 3 for name, w in weights.items()}
    return {"step": 7, "model": weights, "ema": average, "optimizer": {"state": moments}, "epoch": 1}


def test_weights_are_read_without_the_optimizer_and_every_flipped_bit_of_them_is_noticed(tmp_path):
    path, expected = tmp_path / "last.pt", whole_state()
    write_checkpoint(expected, path)
    content, draw = path.read_bytes(), random.Random(0)
    noticed = passed = 0
    for at in sorted(draw.sample(range(len(content)), 400)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
        try:
            found = load_trained(path)
        except UserError:
            noticed += 1
            continue
        passed += 1
        assert "optimizer" not in found
        for name in ("model", "ema"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert noticed > 150  # half of the file are weights
    assert passed > 150  # the other half is not even read


def test_what_shares_memory_is_whole_too(tmp_path):
    """Tied weights, views and empty tensors: torch writes what they share once."""
    path, shared = tmp_path / "last.pt", torch.randn(10)
    model = {"a": shared, "tied": shared, "view": shared[2:5], "empty": torch.empty(0), "own": torch.ones(2)}
    write_checkpoint(state(model=model, ema=None, optimizer={"state": {0: {"exp_avg": torch.zeros(9)}}}), path)
    torch.testing.assert_close(load_trained(path)["model"], model)
    torch.testing.assert_close(map_checkpoint(path)["model"], model)
    assert map_checkpoint(path)["optimizer"]["state"][0]["exp_avg"].sum() == 0


def test_what_is_no_checkpoint_is_refused_and_not_run(tmp_path):
    path, marker = tmp_path / "x.pt", tmp_path / "was_run"
    write_whole({"format": 1, "model": Payload(str(marker))}, path)
    with pytest.raises(UserError, match=r"is refused.*posix.mkdir"):
        load_checkpoint(path)
    assert not marker.exists()
    write_whole({"w": torch.ones(1)}, path)
    with pytest.raises(UserError, match="no checkpoint of this program"):
        load_checkpoint(path)
    write_whole(state(format=99), path)
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "nowhere.pt")
    write_whole(state(format=1), path)
    assert load_checkpoint(path)["step"] == 7  # older formats go on being read


ITSELF = []
ITSELF.append(ITSELF)
LAUGHS = [[[[[[0] * 10] * 10] * 10] * 10] * 10] * 10  # six lists in memory, a million numbers when written out


@pytest.mark.parametrize(
    "entries",
    [
        dict(format="2"), dict(format=None), dict(format=True), dict(format=0.5),
        dict(model=None), dict(model=[1]), dict(model={"w": 1}), dict(model={1: torch.ones(1)}),
        dict(model={"w": torch.ones(2).to_sparse()}), dict(model={"w": torch.zeros(1).expand(10**12)}),
        dict(ema={"w": "text"}), dict(ema=[torch.ones(1)]), dict(ema={"w": torch.zeros(1).expand(10**9)}),
        dict(step=-1), dict(step="7"), dict(step=7.0), dict(step=None), dict(epoch=True), dict(ended_step="1"),
        dict(config=None), dict(config=["model"]), dict(config={1: 2}), dict(config={"model": torch.ones(1)}),
        dict(config={"model": ITSELF}), dict(config={"model": LAUGHS}),
        dict(classes=None), dict(classes="ab"), dict(classes=[1, 2]), dict(classes=[]),
        dict(best=None), dict(best={}), dict(best={"top1": "high", "epoch": 1, "weights": "raw"}),
        dict(best={"top1": float("nan"), "epoch": 1, "weights": "raw"}),
        dict(best={"top1": 1.0, "epoch": 1, "weights": "both"}),
        dict(best={"top1": 1.0, "epoch": 1, "weights": torch.ones(2)}),
        dict(optimizer=[]), dict(images="9"), dict(listing=1), dict(batches=[1]), dict(batches=["2", 4]),
    ],
    ids=lambda entries: next(iter(entries)),
)  # fmt: skip
def test_an_entry_of_another_type_is_refused(entries, tmp_path):
    path = write_whole({"format": 2} | state(**entries), tmp_path / "x.pt")
    with pytest.raises(UserError, match=next(iter(entries))):
        load_checkpoint(path)


def test_a_manifest_of_another_type_is_none(tmp_path):
    path = tmp_path / "x.pt"
    write_checkpoint(state(), path)
    content = path.read_bytes()
    for before, after in ((b'"step": 7', b'"step": "7"'), (b'"step": 7', b'"step": -7'), (b'"bytes": ', b'"bytes": -')):
        path.write_bytes(content.replace(before, after))
        assert step_of(path) is None
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(path)


def test_only_a_zip_file_that_is_stored_is_read(tmp_path):
    """A few kilobytes could become gigabytes; torch's older formats are read by other code."""
    zeros = {"format": 2} | state(model={"w": torch.zeros(10**6)})
    assert len(compressed(zeros)) < 10_000
    path = write_bytes(compressed(zeros), tmp_path / "x.pt")
    with pytest.raises(UserError, match="compressed"):
        load_checkpoint(path)
    old = write_whole({"format": 2} | state(), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError):
        load_checkpoint(old)
    stored = write_whole({"format": 2} | state(), tmp_path / "stored.pt").read_bytes()
    both = write_bytes(old.read_bytes() + stored[: stored.rindex(b"\ncontextual-cnn")], tmp_path / "x.pt")
    with pytest.raises(UserError):
        load_checkpoint(both)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("folder.pt", "pipe.pt"):
        for read in (step_of, load_checkpoint):
            with pytest.raises(DamagedCheckpoint, match=name):
                read(tmp_path / name)


def test_a_resume_takes_the_newest_that_is_a_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointSettings())
    write_checkpoint(state(step=3), store.best)
    write_whole({"format": 2} | state(step=9, best="high"), store.last)
    os.mkfifo(store.previous)
    assert store.newest()[1]["step"] == 3


def test_a_run_folder_means_its_best_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        find_checkpoint(str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last.pt", "best.pt"):
        write_checkpoint(state(), folder / name)
        assert find_checkpoint(str(tmp_path)) == folder / name
    assert find_checkpoint(str(folder / "last.pt")) == folder / "last.pt"

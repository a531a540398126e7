"""Only the same run goes on unasked."""

import logging

import pytest
import torch

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.runs import resume
from contextual_cnn.runs.checkpoint import write_checkpoint
from contextual_cnn.runs.checkpoint_store import CheckpointStore
from contextual_cnn.runs.resume import check_resumed, read_newest
from contextual_cnn.settings.checkpoint import CheckpointSettings
from tests.helpers.facts import tells

CONFIG = {
    "data": {"root": "/a"},
    "optimizer": {"lr": 0.1},
    "trainer": {"log_every": 1, "global_batch_size": 8},
}


def plan(**changes):
    return BatchPlan.make(**dict(images=9, global_batch=8, micro_batch=4, world_size=2) | changes)


def resumed(store, config, plan, policy, classes=("a",), listing="abc"):
    record = {"config": config, "classes": list(classes), "images": plan.images, "listing": listing}
    found = read_newest(store, World(0, 1, 0, torch.device("cpu")))
    return check_resumed(found, record, plan, policy, ("data.root", "trainer.log_every"))


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointSettings())
    assert resumed(store, CONFIG, plan(), "auto") is None
    store.save(
        {
            "model": {"w": torch.ones(3)},
            "ema": None,
            "optimizer": {},
            "best": {"top1": 50.0, "epoch": 1, "weights": "raw"},
            "step": 7,
            "epoch": 1,
            "ended_step": 7,
            "classes": ["a"],
            "images": 9,
            "listing": "abc",
            "batches": [2, 4],
            "config": CONFIG,
        }
    )
    store.close()
    return store


@pytest.mark.parametrize("said", [-1, 0, 1])
def test_the_other_processes_of_a_node_take_the_file_that_the_first_has_checked(store, monkeypatch, said):
    monkeypatch.setattr(resume, "gather_numbers", lambda numbers: [[0], [99], [said], numbers])
    store.save(torch.load(store.last, weights_only=True) | {"step": 8})
    store.close()
    again = CheckpointStore(store.folder, CheckpointSettings())
    monkeypatch.setattr(again, "newest", None)  # it reads nothing by itself
    found = read_newest(again, World(rank=3, size=4, local_rank=1, device=torch.device("cpu")))
    assert (found and found[1]["step"]) == {-1: None, 0: 8, 1: 7}[said]


def test_a_node_whose_first_process_finds_nothing_usable_does_not_start_from_zero(store, monkeypatch):
    store.last.write_bytes(b"")
    told = []
    monkeypatch.setattr(resume, "gather_numbers", lambda numbers: told.append(numbers) or [numbers, numbers])
    with pytest.raises(UserError, match=r"last\.pt"):
        read_newest(store, World(0, 2, 0, torch.device("cpu")))
    monkeypatch.setattr(resume, "gather_numbers", lambda numbers: [told[0], numbers])
    with pytest.raises(UserError, match="none of the checkpoints"):
        read_newest(store, World(1, 2, 1, torch.device("cpu")))


@pytest.mark.parametrize("entry", ["config", "classes", "best", "ema", "optimizer", "ended_step", "images", "batches"])
def test_a_checkpoint_without_an_entry_is_refused(store, entry):
    state = torch.load(store.last, weights_only=True)
    del state[entry]
    write_checkpoint(state, store.last)
    with pytest.raises(UserError, match=entry):
        resumed(store, CONFIG, plan(), "anyway")


def test_what_makes_no_other_run_may_change(store):
    moved = CONFIG | {"data": {"root": "/b"}, "trainer": CONFIG["trainer"] | {"log_every": 50}}
    assert resumed(store, moved, plan(), "auto")["step"] == 7


def test_a_run_from_before_data_interpolation_was_bicubic(store):
    now = CONFIG | {"data": CONFIG["data"] | {"interpolation": "bicubic"}}
    assert resumed(store, now, plan(), "auto")["step"] == 7
    now["data"]["interpolation"] = "bilinear"
    with pytest.raises(UserError, match=r"data.interpolation: bicubic -> bilinear"):
        resumed(store, now, plan(), "auto")


def test_another_recipe_or_other_data_are_refused_or_mentioned(store, caplog):
    changed = CONFIG | {"optimizer": {"lr": 0.2}}
    with pytest.raises(UserError, match=r"optimizer.lr: 0.1 -> 0.2"):
        resumed(store, changed, plan(), "auto")
    with pytest.raises(UserError, match=r"\b9\b.*\babc\b.*\b10\b.*\bdef\b"):
        resumed(store, CONFIG, plan(images=10), "auto", listing="def")
    assert resumed(store, changed, plan(images=10), "anyway", listing="def")["step"] == 7
    assert tells(caplog.text, "optimizer.lr", "0.1", "0.2")
    with pytest.raises(UserError, match="other classes"):
        resumed(store, CONFIG, plan(), "anyway", classes=["b"])


def test_another_number_of_processes_is_said_and_another_global_batch_refused(store, caplog):
    caplog.set_level(logging.INFO)
    assert resumed(store, CONFIG, plan(world_size=1), "auto")["step"] == 7
    assert tells(caplog.text, "2", "processes", "1")
    assert "no image of the epoch is lost or repeated" in caplog.text
    assert "drawn anew" not in caplog.text
    resumed(store, CONFIG, plan(micro_batch=2), "auto")
    assert tells(caplog.text, "micro-batches", "2", "images", "4")
    with pytest.raises(UserError, match=r"\b8 images.*trainer\.global_batch_size=6"):
        resumed(store, CONFIG, plan(global_batch=6, micro_batch=3), "anyway")

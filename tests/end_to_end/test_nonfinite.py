"""Losses and gradients that are not finite: no weight changes, and there is something to look at."""

import re

import pytest
import torch

from contextual_cnn.runs.checkpoint import load_checkpoint
from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import small_run
from tests.helpers.facts import tells
from tests.helpers.quick_start import run

pytestmark = pytest.mark.run

EXPLODING = ["optimizer.lr=1e30", "schedule.warmup_epochs=0"]


def test_skipping_has_an_end_and_shows_the_batch(image_root, tmp_path):
    overrides = [*EXPLODING, "trainer.max_skipped_steps=2"]
    status, printed = run(*small_run(image_root, tmp_path, *overrides), output=tmp_path / "output")
    assert status == 2, printed
    assert tells(printed, "finite", "2", "steps", "step")
    losses = ", ".join(rf"loss_stage{stage} \S+" for stage in (1, 2, 3, 4))
    assert re.search(rf"{losses}; lr 9.83e\+29; batch in .*nonfinite", printed)
    assert "optimizer.lr" in printed
    batch = torch.load(tmp_path / "run" / "nonfinite" / "step_2_rank_0.pt", weights_only=True)
    assert batch["images"].shape == (8, 3, 32, 32)
    assert batch["images"].isfinite().all()
    assert batch["targets"].shape == (8, 6)
    assert batch["step"] == 1
    assert batch["lr"] == pytest.approx(9.83e29, rel=1e-3)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["train/skipped_steps"] == 0
    # What the weights had become was not saved as something to resume from
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_stop_takes_no_step_after_the_first_bad_one_although_it_looks_later(image_root, tmp_path):
    overrides = [*EXPLODING, "trainer.on_nonfinite=stop", "trainer.log_every=3"]
    status, printed = run(*small_run(image_root, tmp_path, *overrides), output=tmp_path / "output")
    assert status == 2, printed
    assert tells(printed, "finite", "2", "steps", "step")
    assert (tmp_path / "run" / "nonfinite" / "step_2_rank_0.pt").exists()


def test_rollback_goes_on_with_the_data_that_follow(image_root, tmp_path):
    done = [*small_run(image_root, tmp_path), "trainer.on_nonfinite=rollback", "trainer.max_skipped_steps=1"]
    status, printed = run(*done, "trainer.max_steps=3", output=tmp_path / "output")
    assert status == 0, printed
    good = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    # From here on every step explodes: the rollback is tried, and tried again, and then given up
    exploding = ["optimizer.lr=1e30", "resume=anyway"]
    status, printed = run(*done, *exploding, output=tmp_path / "output")
    assert status == 2, printed
    assert printed.count("back to the weights of") == 3
    assert tells(printed, "weights", "step", "3")
    assert tells(printed, "finite", "1", "steps")
    kept = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert kept["step"] == 3
    assert all(torch.equal(kept["model"][name], tensor) for name, tensor in good["model"].items())
    # With the learning rate put right the same run goes on from there
    status, printed = run(*done, "resume=anyway", output=tmp_path / "output")
    assert status == 0, printed
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 12

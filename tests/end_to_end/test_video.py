"""Videos by the real commands: trained, stopped, gone on with, shared by two processes, evaluated."""

import csv
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contextual_cnn.data.video.decode import read_frames
from tests.conftest import run_command, run_group
from tests.helpers.endings import assert_same_end, checkpoint, losses, steps_logged
from tests.helpers.quick_start import Command, run

pytestmark = pytest.mark.run


def small_video_run(root, output_dir, *overrides):
    return [
        "train.py",
        "experiment=moving_digits",
        f"data.root={root}",
        "data.threads=1",
        "data.eval_batch_size=6",
        "clip.frames=4",
        "model.timm_options={layers: [1, 1, 1, 1], base_width: 16}",
        "schedule.epochs=3",
        "trainer.global_batch_size=8",
        "trainer.micro_batch_size=4",
        "trainer.norm_batch=4",
        "trainer.device=cpu",
        "trainer.log_every=1",
        "trainer.ema_decay=0.9",
        "logger=local",
        f"output_dir={output_dir}",
        "run_name=run",
        *overrides,
    ]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    made = run_command("scripts/data/prepare_moving_digits.py", str(folder), "--train", "32", "--val", "20")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def straight(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    status, printed = run(*small_video_run(digits, folder), output=folder / "output")
    assert status == 0, printed
    assert "train 32 videos, val 20 videos" in printed
    return folder


def test_every_clip_is_there_backwards_with_the_very_same_pictures(digits):
    """Otherwise a model could tell the directions apart without looking at the order."""
    pairs = [
        (there, digits / split / back / there.name)
        for split in ("train", "val")
        for forth, back in (("right", "left"), ("down", "up"))
        for there in sorted((digits / split / forth).iterdir())
    ]
    assert len(pairs) == (32 + 20) // 2
    for there, back in pairs:
        forwards, backwards = (read_frames(path.read_bytes(), np.arange) for path in (there, back))
        assert np.array_equal(forwards, backwards[::-1])
        assert not np.array_equal(forwards, backwards)


def test_a_run_that_was_stopped_in_an_epoch_ends_with_the_same_bits(straight, digits, tmp_path):
    started = Command(*small_video_run(digits, tmp_path), output=tmp_path / "output")
    started.wait_until(lambda: 6 in steps_logged(tmp_path))
    started.send(signal.SIGTERM)
    assert started.wait() == 75, started.printed
    assert checkpoint(tmp_path)["step"] < 12
    status, printed = run(*small_video_run(digits, tmp_path), output=tmp_path / "output")
    assert status == 0, printed
    assert_same_end(straight, tmp_path)


def test_two_processes_learn_what_one_learns(straight, digits, tmp_path):
    together = run_group(2, *small_video_run(digits, tmp_path))
    assert together.returncode == 0, together.stdout
    first = [[loss for _, loss, *_ in losses(folder)][:3] for folder in (tmp_path, straight)]
    assert first[0] == pytest.approx(first[1], rel=1e-3)  # rounding grows from step to step


def test_an_evaluation_counts_every_video_once_by_several_views(straight):
    run_folder = straight / "run"
    for views in ([], ["clip.clips=2", "clip.crops=10"], ["clip.crops=3", "context=swap"]):
        done = run_command("evaluate.py", f"checkpoint={run_folder}", "device=cpu", *views)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().splitlines()[-1].startswith("top-1 ")
    written = {path.name for path in (run_folder / "checkpoints").glob("evaluation*.json")}
    assert len(written) == 3
    assert "evaluation.json" in written


def test_a_video_is_named_with_its_frames_and_shortlists(straight, digits, tmp_path):
    """A picture, an animation of the clip, and a table of a folder, in which a file is not a video."""
    clips = sorted((digits / "val" / "left").iterdir())
    predict = ("scripts/model/predict.py", "--checkpoint", str(straight / "run"), "--device", "cpu")
    done = run_command(*predict, str(clips[0]), "--output", str(tmp_path / "clip.png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" %") == 4  # classes
    for stage, size in ((1, 3), (2, 2), (3, 1)):
        assert f"after stage {stage}: {size} of 4 classes a frame, of 4 frames: " in done.stdout
    animated = run_command(*predict, str(clips[0]), "--output", str(tmp_path / "clip.gif"))
    assert animated.returncode == 0, animated.stderr
    with Image.open(tmp_path / "clip.png") as picture, Image.open(tmp_path / "clip.gif") as animation:
        assert picture.width > 1000
        assert animation.n_frames == 4
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / clips[0].name).write_bytes(clips[0].read_bytes())
    (folder / "broken.mp4").write_bytes(clips[0].read_bytes()[:100])
    table = run_command(*predict, str(folder), "--output", str(tmp_path / "clips.csv"))
    assert table.returncode == 1
    assert "broken.mp4" in table.stderr
    (row,) = csv.DictReader((tmp_path / "clips.csv").read_text().splitlines())
    assert row["video"].endswith(clips[0].name)
    assert f"{100 * float(row['probability1']):.2f} %" in done.stdout


def test_a_prediction_is_what_the_evaluation_found(straight, digits, tmp_path):
    """Of every video of the val split."""
    found = tmp_path / "evaluated.csv"
    run_folder = str(straight / "run")
    done = run_command("evaluate.py", f"checkpoint={run_folder}", "device=cpu", f"predictions={found}")
    assert done.returncode == 0, done.stderr
    predict = ("scripts/model/predict.py", "--checkpoint", run_folder, "--device", "cpu")
    done = run_command(*predict, str(digits / "val"), "--output", str(tmp_path / "predicted.csv"))
    assert done.returncode == 0, done.stderr
    evaluated, predicted = (
        list(csv.DictReader(path.read_text().splitlines())) for path in (found, tmp_path / "predicted.csv")
    )
    assert len(predicted) == len(evaluated) == 20
    by_name = {"/".join(Path(row["video"]).parts[-2:]): row for row in predicted}
    for row in evaluated:
        ours = by_name["/".join(Path(row["name"]).parts[-2:])]
        assert ours["class1"] == row["class1"]
        assert float(ours["probability1"]) == pytest.approx(float(row["probability1"]), abs=1e-4)


def test_a_script_of_images_refuses_a_model_of_videos(straight):
    refused = run_command("scripts/analysis/analyze.py", "shortlist", "--checkpoint", str(straight / "run"))
    assert refused.returncode == 2
    assert "video_classification" in refused.stderr

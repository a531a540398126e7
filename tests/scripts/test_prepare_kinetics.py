"""Kinetics from its lists and from clips, as far as there are any."""

import csv

import numpy as np
import pytest

from contextual_cnn.data.video.decode import read_frames
from scripts.data import prepare_kinetics
from tests.conftest import run_command
from tests.data.video.clips import grey_frames, numbers, write_video

SCRIPT = "scripts/data/prepare_kinetics.py"
ROWS = {
    "train": ["air drumming,aaaaaaaaaaa,4,14,train", "abseiling,-bbbbbbbb_b,0,10,train", "abseiling,gone,1,11,train"],
    "validate": ["air drumming,ccccccccccc,7,17,val"],
}


@pytest.fixture
def kinetics(tmp_path):
    """Lists and clips: two by their full names, one by its id, one that is not a video."""
    lists, videos = tmp_path / "lists", tmp_path / "videos"
    (videos / "any" / "folder").mkdir(parents=True)
    lists.mkdir()
    for name, rows in ROWS.items():
        (lists / f"{name}.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]) + "\n")
    write_video(videos / "any" / "aaaaaaaaaaa_000004_000014.mp4", grey_frames(12), "libx264")
    write_video(videos / "any" / "folder" / "ccccccccccc.mkv", grey_frames(9))
    (videos / "-bbbbbbbb_b_000000_000010.mp4").write_bytes(b"no video")
    return lists, videos


def prepared(kinetics, root, *options):
    return run_command(SCRIPT, *map(str, (*kinetics, root)), "--workers", "1", *options)


@pytest.mark.run
def test_what_is_there_is_transcoded_and_the_rest_named(kinetics, tmp_path):
    root = tmp_path / "root"
    done = prepared(kinetics, root, "--short-side", "32")
    assert done.returncode == 0, done.stderr
    assert "train: 1 videos in 1 classes (3 listed, 1 not there, 1 that cannot be used)" in done.stdout
    assert "val: 1 videos in 1 classes (1 listed, 0 not there, 0 that cannot be used)" in done.stdout
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*.mov"))
    assert files == [
        "train/air_drumming/aaaaaaaaaaa_000004_000014.mov",
        "val/air_drumming/ccccccccccc_000007_000017.mov",
    ]
    for file, count in zip(files, (12, 9), strict=True):
        counted = []
        frames = read_frames((root / file).read_bytes(), lambda n, counted=counted: counted.append(n) or np.arange(n))
        assert counted == [count]
        assert frames.shape == (count, 32, 43, 3)  # of 48 x 64
        assert numbers(frames) == list(range(count))
    reasons = {row["clip"]: row["reason"] for row in csv.DictReader((root / "left_out.csv").read_text().splitlines())}
    assert reasons["gone_000001_000011"] == "not there"
    assert set(reasons) == {"gone_000001_000011", "'-bbbbbbbb_b_000000_000010"}  # no formula for a spreadsheet


@pytest.mark.run
def test_the_same_command_goes_on_and_adds_what_has_come(kinetics, tmp_path):
    root = tmp_path / "root"
    assert prepared(kinetics, root).returncode == 0
    first = {path: path.stat().st_mtime_ns for path in root.rglob("*.mov")}
    write_video(kinetics[1] / "gone.mp4", grey_frames(8))
    done = prepared(kinetics, root)
    assert done.returncode == 0, done.stderr
    assert "train: 2 videos in 2 classes" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in first} == first


def test_a_killed_process_leaves_nothing_that_looks_like_a_video(kinetics, tmp_path, monkeypatch):
    """Training reads every video that is in a class's folder."""

    def killed(encoded, output, short_side, quality):
        output.write_bytes(b"half")
        raise KeyboardInterrupt

    root = tmp_path / "root"
    monkeypatch.setattr(prepare_kinetics, "transcode", killed)
    monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, (*kinetics, root)), "--workers", "1"])
    with pytest.raises(KeyboardInterrupt):
        prepare_kinetics.main()
    assert [path.relative_to(root).parts[0] for path in root.rglob("*.mov")] == [".unfinished"]
    monkeypatch.undo()
    assert prepared(kinetics, root).returncode == 0
    assert not (root / ".unfinished").exists()
    assert len(list(root.rglob("*.mov"))) == 2


@pytest.mark.run
@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("abseiling,../../etc/passwd,0,10,train", "line 2: no YouTube id"),
        (" ,aaaaaaaaaaa,0,10,train", "line 2: no label"),
        ("abseiling,aaaaaaaaaaa,10,0,train", "line 2: no times"),
        ("abseiling,aaaaaaaaaaa,soon,0,train", "line 2: could not convert"),
        ("abseiling", "line 2: it has too few columns"),
    ],
)
def test_a_row_that_cannot_be_is_named_before_anything_is_written(kinetics, tmp_path, row, cause):
    (kinetics[0] / "train.csv").write_text(f"label,youtube_id,time_start,time_end,split\n{row}\n")
    done = prepared(kinetics, tmp_path / "root")
    assert done.returncode == 2
    assert cause in done.stderr
    assert not (tmp_path / "root").exists()


@pytest.mark.run
def test_lists_or_clips_that_are_not_there_are_explained(kinetics, tmp_path):
    lists, videos = kinetics
    (tmp_path / "empty").mkdir()
    for given, cause in (
        ((tmp_path / "empty", videos), "has no train.csv"),
        ((lists, tmp_path / "nowhere"), "is not a folder"),
        ((lists, tmp_path / "empty"), "none of the 4 clips"),
    ):
        done = prepared(given, tmp_path / "root")
        assert done.returncode == 2, done.stdout
        assert cause in done.stderr
    (lists / "validate.csv").write_text("label,id\n")
    assert "no column youtube_id" in prepared(kinetics, tmp_path / "root").stderr

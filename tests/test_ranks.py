"""Two processes of one run, of which one fails, hangs, never comes, or sees something else."""

import os
import shutil

import pytest

from tests.endings import checkpoint
from tests.kills import smallest_run
from tests.quick_start import Command, group


@pytest.fixture
def images(image_root, tmp_path):
    """A copy to do damage in. Of the val split rank 1 takes the second image of 18, the fourth, and so on."""
    return shutil.copytree(image_root, tmp_path / "images")


def test_a_rank_that_fails_alone_says_why(images, tmp_path):
    (images / "val" / "class_0" / "1.JPEG").write_bytes(b"<html>404 not found</html>" * 50)
    ranks = group(2, *smallest_run(images, tmp_path, "data.on_bad_image=stop"), folder=tmp_path)
    assert [rank.wait() for rank in ranks] == [1, 2]
    assert "error: the image val/class_0/1.JPEG cannot be used" in ranks[1].printed
    assert "on: rank 1, " in ranks[1].printed
    assert "rank 0, in the evaluation after step 3: another process of the run has ended" in ranks[0].printed
    assert "Traceback" not in ranks[0].printed + ranks[1].printed


def test_a_rank_that_hangs_shows_its_stacks_and_the_others_end(images, tmp_path):
    """A file that does not answer: a named pipe that nobody writes to, put there when the files have been listed."""
    ranks = group(2, *smallest_run(images, tmp_path, "trainer.timeout_minutes=0.1"), folder=tmp_path)
    ranks[0].wait_until(lambda: "run folder" in ranks[0].printed)
    image = images / "val" / "class_0" / "1.JPEG"
    image.unlink()
    os.mkfifo(image)
    assert ranks[0].wait() == 1
    assert "rank 0, in the evaluation after step 3: another process" in ranks[0].printed
    assert "did not answer within 0.1 min" in ranks[0].printed
    ranks[1].wait_until(lambda: "its stacks follow" in ranks[1].printed and "reader.py" in ranks[1].printed)
    assert "rank 1 has been in the evaluation after step 3 for 6 s" in ranks[1].printed
    assert "its stacks follow" not in ranks[0].printed.split("error: ")[0]
    ranks[1].process.kill()


def test_a_rank_that_never_comes_is_waited_for_as_long_as_set(image_root, tmp_path):
    place = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29876")
    command = smallest_run(image_root, tmp_path, "trainer.timeout_minutes=0.05")
    alone = Command(*command, output=tmp_path / "output", **place)
    assert alone.wait(60) == 1
    assert "error: rank 0: 2 processes were to meet at 127.0.0.1:29876 within 0.05 min, and did not" in alone.printed
    assert "1/2 clients joined" in alone.printed
    assert "Traceback" not in alone.printed


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
    assert "error: not the same configuration on rank 1 of 2 as on rank 0" in ranks[0].printed
    assert not (elsewhere / "run").exists()
    assert checkpoint(tmp_path)["step"] == before["step"]

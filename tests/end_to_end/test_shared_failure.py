"""What ends one process ends all of them with the cause, also where the collectives tell nobody, as under NCCL."""

import shutil

import pytest

from tests.helpers.facts import tells
from tests.helpers.kills import smallest_run
from tests.helpers.launched import Launched
from tests.helpers.quick_start import group

pytestmark = pytest.mark.run

LIKE_NCCL = "tests/helpers/train_like_nccl.py"


@pytest.fixture
def images(image_root, tmp_path):
    """Of the val split rank 1 takes the second image, which is none."""
    copy = shutil.copytree(image_root, tmp_path / "images")
    (copy / "val" / "class_0" / "1.JPEG").write_bytes(b"<html>404 not found</html>" * 50)
    return copy


def like_nccl(arguments):
    return [LIKE_NCCL, *arguments[1:]]


def test_a_mistake_of_one_process_ends_all_with_its_cause(images, tmp_path):
    arguments = smallest_run(images, tmp_path, "data.on_bad_image=stop")
    ranks = group(2, *like_nccl(arguments), folder=tmp_path)
    assert [rank.wait(60) for rank in ranks] == [1, 2]
    for rank in ranks:
        assert "val/class_0/1.JPEG cannot be used" in rank.printed
        assert tells(rank.printed, "rank", "1")
        assert "Traceback" not in rank.printed


def test_a_defect_of_one_process_ends_all_with_its_cause(image_root, tmp_path):
    """Not the user's mistake: a restart may help, so the status is 1."""
    broken = {1: dict(TEST_BROKEN_EVALUATION="1")}
    arguments = smallest_run(image_root, tmp_path)
    ranks = group(2, *like_nccl(arguments), folder=tmp_path, environments=broken)
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    assert tells(ranks[0].printed, "rank", "1", "ZeroDivisionError")
    assert "Traceback" in ranks[1].printed


def test_a_mistake_of_one_process_is_one_start_under_the_launcher(images, tmp_path):
    """It neither waits for the timeout, which is ten minutes, nor starts again."""
    launched = Launched(tmp_path, *like_nccl(smallest_run(images, tmp_path, "data.on_bad_image=stop")))
    assert launched.wait(60) == 2
    assert launched.printed.count("run folder") == 1
    assert tells(launched.printed, "error", "val/class_0/1.JPEG")
    assert tells(launched.printed, "rank", "1")

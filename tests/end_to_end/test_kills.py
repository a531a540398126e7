"""A few of the kills and preemptions that tests/fault_suite.py does by the hundred."""

import pytest

from tests.helpers import kills

pytestmark = [pytest.mark.run, pytest.mark.slow]


def test_killed_at_random_moments(image_root, tmp_path):
    count = kills.kill_at_random_moments(image_root, tmp_path, 8, damage=True)
    assert count.kills == 8
    assert count.finished > 0


def test_two_ranks_with_batch_norms_are_preempted(image_root, tmp_path):
    """The statistics that count are rank 0's, in the checkpoint as in the evaluation; or the end would differ."""
    assert "2 of 2 times" in kills.preempt_two_ranks(image_root, tmp_path, 2)

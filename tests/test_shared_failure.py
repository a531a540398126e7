"""What a process does about the others before it ends."""

import pytest

from contextual_cnn.errors import LostProcess
from contextual_cnn.shared_failure import SharedFailure


class CutOff:
    """The store of a node that cannot be reached any more: whatever waits for its answer waits for ever."""

    def clone(self):
        return self

    def check(self, _):
        return False

    def add(self, *_):
        raise AssertionError("asked for an answer")


def test_a_process_that_was_told_nothing_waits_for_no_answer_of_the_store():
    with pytest.raises(LostProcess), SharedFailure(CutOff(), rank=1, size=2):
        raise LostProcess("rank 0 does not answer")

"""Time limits as people write them."""

import pytest

from contextual_cnn.engine.stopping import StopRequest, seconds_of
from contextual_cnn.errors import UserError


@pytest.mark.parametrize(
    ("written", "seconds"),
    [(None, None), ("3:50:00", 13800), ("3:50", 13800), ("0:00:30", 30), (2, 7200), (0.5, 1800)],
)
def test_time_limits(written, seconds):
    assert seconds_of(written) == pytest.approx(seconds)


@pytest.mark.parametrize("written", [0, -1, "1:75", "soon", "", 13800, "0:00"])
def test_what_is_no_time_limit(written):
    with pytest.raises(UserError, match=r"trainer.max_time=3:50:00"):
        seconds_of(written)


def test_the_limit_is_a_reason_to_stop():
    assert StopRequest().reason is None
    assert StopRequest(1000).reason is None
    assert StopRequest(0).reason == "trainer.max_time is over"

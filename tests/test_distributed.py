"""Which errors are about another process."""

import pytest
import torch.distributed as dist

from contextual_cnn.distributed import _is_about_a_peer


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error"), True),
        (RuntimeError("Application timeout caused pair closure"), True),  # gloo, where another collective timed out
        (dist.DistNetworkError("Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_about_a_peer_are_told_from_defects(error, is_so):
    assert _is_about_a_peer(error) == is_so

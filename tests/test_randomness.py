"""What a draw depends on: its key, and nothing else."""

import numpy as np
import pytest
import torch

from contextual_cnn.randomness import Purpose, seed_all, uniform_rows


@pytest.mark.parametrize("seed", [0, 2**64, 2**200 + 1])
def test_a_seed_may_have_any_size(seed):
    draws = []
    for _ in range(2):
        seed_all(Purpose.MICRO_BATCH, seed, 7)
        draws.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))  # noqa: NPY002 - as timm's Mixup draws
    assert draws[0] == draws[1]
    seed_all(Purpose.MICRO_BATCH, seed + 1, 7)
    assert torch.rand(3).tolist() != draws[0][0]


def test_a_row_does_not_depend_on_the_rows_that_are_made_with_it():
    whole = uniform_rows(Purpose.IMAGE, 3, 1, start=0, rows=50, columns=8)
    assert np.array_equal(uniform_rows(Purpose.IMAGE, 3, 1, start=20, rows=5, columns=8), whole[20:25])
    assert len(np.unique(whole)) == whole.size

"""How places of a global batch fall to processes, micro-batches and statistics: the same for 1 to 1,024 processes."""

import numpy as np
import pytest

from contextual_cnn.batch_plan import BatchPlan, NormPlan
from contextual_cnn.randomness import Places, Purpose

GLOBAL = 4096
POWERS = [2**n for n in range(11)]


def plan_of(world_size, micro_batch=128):
    return BatchPlan.make(images=100_000, global_batch=GLOBAL, micro_batch=micro_batch, world_size=world_size)


def micro_batches(plan):
    """(rank, first place) of each, in the order of the places."""
    found = [(rank, plan.first_place(a, rank)) for a in range(plan.accumulation) for rank in range(plan.world_size)]
    return sorted(found, key=lambda pair: pair[1])


@pytest.mark.parametrize("world_size", POWERS)
def test_every_place_of_a_global_batch_is_computed_once(world_size):
    plan = plan_of(world_size)
    firsts = [first for _, first in micro_batches(plan)]
    assert firsts == list(range(0, GLOBAL, plan.micro_batch))


@pytest.mark.parametrize("world_size", POWERS)
def test_what_is_drawn_for_a_place_is_the_same_for_any_number_of_processes(world_size):
    plan = plan_of(world_size)
    drawn = [Places(5, 77, first, plan.micro_batch).uniform(Purpose.DROP_PATH, 8) for _, first in micro_batches(plan)]
    assert np.array_equal(np.concatenate(drawn), Places(5, 77, 0, GLOBAL).uniform(Purpose.DROP_PATH, 8))


@pytest.mark.parametrize("micro_batch", [128, 256, 512])
@pytest.mark.parametrize("world_size", POWERS)
def test_a_statistic_is_of_the_same_128_places_for_any_number_of_processes(world_size, micro_batch):
    plan = plan_of(world_size, micro_batch)
    groups = NormPlan.make(plan, 128)
    assert groups.images == 128
    assert 1 in (groups.parts, groups.ranks)
    for start in range(0, GLOBAL, 128):  # its micro-batches lie on ranks that follow one another, at one time
        parts = [
            (rank, first) for rank, first in micro_batches(plan) if first < start + 128 <= first + 128 * groups.parts
        ]
        parts = parts or [(rank, first) for rank, first in micro_batches(plan) if start <= first < start + 128]
        ranks = [rank for rank, _ in parts]
        assert ranks == list(range(ranks[0], ranks[0] + groups.ranks))
        assert ranks[0] % groups.ranks == 0


@pytest.mark.parametrize(
    ("world_size", "global_batch", "micro_batch", "wanted", "expected"),
    [
        (1, 16, 16, 128, NormPlan(16)),  # no more than a global batch
        (1, 16, 8, 128, NormPlan(8)),  # accumulated ones cannot be joined
        (2, 16, 8, 128, NormPlan(16, ranks=2)),
        (2, 32, 8, 128, NormPlan(16, ranks=2)),
        (4, 4096, 64, 128, NormPlan(128, ranks=2)),
        (3, 192, 64, 128, NormPlan(64)),  # two of three ranks are no partition
        (6, 4608, 48, 128, NormPlan(96, ranks=2)),
        (1, 4096, 512, 128, NormPlan(128, parts=4)),
        (1, 384, 192, 128, NormPlan(192)),  # cut in two it would be smaller than wanted
        (1, 4608, 288, 128, NormPlan(144, parts=2)),
        (8, 4096, 128, 32, NormPlan(32, parts=4)),
    ],
)
def test_a_number_that_cannot_be_had_is_come_near_to(world_size, global_batch, micro_batch, wanted, expected):
    plan = BatchPlan.make(images=10_000, global_batch=global_batch, micro_batch=micro_batch, world_size=world_size)
    assert NormPlan.make(plan, wanted) == expected

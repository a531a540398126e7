"""Which image goes where, by brute force."""

import itertools

import numpy as np
import pytest

from contextual_cnn.data.sampler import BatchPlan, TrainSampler, epoch_order, evaluation_batches
from contextual_cnn.errors import UserError
from contextual_cnn.randomness import Purpose, uniform_rows


def plan(images=100, global_batch=16, micro_batch=4, world_size=2):
    return BatchPlan.make(images=images, global_batch=global_batch, micro_batch=micro_batch, world_size=world_size)


def micro_batches(plan, step, seed=3):
    """What all ranks compute in a step, in the order of the run-wide numbers."""
    found = {}
    for rank in range(plan.world_size):
        sampler = TrainSampler(plan, seed, rank)
        for accumulated in range(plan.accumulation):
            batch = sampler[step * plan.accumulation + accumulated]
            found[plan.micro_batch_number(step, accumulated, rank)] = batch
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("images", [16, 17, 31, 32, 100])
@pytest.mark.parametrize(("micro_batch", "world_size"), [(16, 1), (4, 1), (4, 2), (2, 4), (1, 16)])
def test_an_epoch_shows_no_image_twice_and_leaves_out_less_than_a_batch(images, micro_batch, world_size):
    p = plan(images, 16, micro_batch, world_size)
    for epoch in range(3):
        steps = range(epoch * p.steps_per_epoch, (epoch + 1) * p.steps_per_epoch)
        shown = np.concatenate([b.indices for step in steps for b in micro_batches(p, step)])
        assert len(shown) == len(set(shown.tolist())) == images - images % 16
        assert {b.epoch for step in steps for b in micro_batches(p, step)} == {epoch}


def test_every_way_to_share_out_a_global_batch_has_the_same_micro_batches():
    alone, shared = plan(world_size=1), plan(world_size=4)
    for step in range(20):
        for one, other in zip(micro_batches(alone, step), micro_batches(shared, step), strict=True):
            assert one.start == other.start
            assert one.indices.tolist() == other.indices.tolist()


def test_a_sampler_started_at_a_step_continues_the_sequence():
    p = plan()
    from_start, later = TrainSampler(p, 0, 1), TrainSampler(p, 0, 1, first_step=7)
    for n in range(10):
        assert later[n].indices.tolist() == from_start[7 * p.accumulation + n].indices.tolist()


def test_epochs_and_seeds_are_shuffled_anew():
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        assert sorted(one) == list(range(1000))
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_imagenet_has_312_steps_of_4096():
    p = plan(1_281_167, 4096, 128, 8)
    assert (p.accumulation, p.steps_per_epoch, p.left_out) == (4, 312, 3215)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(global_batch=30, world_size=4), "shared by 4"),
        (dict(global_batch=24, micro_batch=5, world_size=2), "no multiple"),
        (dict(images=10), "less than one global batch"),
        (dict(micro_batch=0), "positive"),
    ],
)
def test_batches_that_do_not_come_out_even_are_refused_with_two_choices(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        plan(**arguments)
    assert "trainer." in error.value.fix


def test_evaluation_counts_every_image_once():
    for images in range(41):
        for world_size in range(1, 5):
            for batch_size in (1, 3, 8):
                shown = [
                    batch.tolist()
                    for rank in range(world_size)
                    for batch in evaluation_batches(images, batch_size, rank, world_size)
                ]
                assert sorted(itertools.chain.from_iterable(shown)) == list(range(images))
                assert all(0 < len(batch) <= batch_size for batch in shown)


def test_rows_of_the_uniform_table_do_not_depend_on_how_it_is_read():
    table = uniform_rows(Purpose.IMAGE, 2, start=0, rows=50, columns=24)
    assert (uniform_rows(Purpose.IMAGE, 2, start=17, rows=9, columns=24) == table[17:26]).all()
    assert (uniform_rows(Purpose.IMAGE, 3, start=0, rows=50, columns=24) != table).all()
    big = uniform_rows(Purpose.IMAGE, 5, start=0, rows=20000, columns=4)
    assert abs(big.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(big.T) - np.eye(4)).max() < 0.03

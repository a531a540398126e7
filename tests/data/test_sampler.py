"""Which image goes where, by brute force."""

import itertools

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from contextual_cnn.data.sampler import (
    BatchPlan,
    ShardWindows,
    TrainSampler,
    epoch_order,
    evaluation_batches,
    repeat_images,
    windowed_order,
)
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
        (dict(global_batch=30, world_size=4), r"trainer\.global_batch_size=30\b.*\b4\b"),
        (dict(global_batch=24, micro_batch=5, world_size=2), r"\b12\b.*trainer\.micro_batch_size=5\b"),
        (dict(images=10), r"\b10 images.*\b16\b"),
        (dict(micro_batch=0), "micro_batch_size=0"),
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


@pytest.mark.parametrize("images", [24, 31, 100])
@pytest.mark.parametrize("repeats", [1, 2, 3, 5, 24])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_repeated_augmentation_shows_fewer_images_each_several_times(images, repeats, world_size):
    p = plan(images, 12, 12 // world_size // (3 if world_size < 4 else 1), world_size)
    for epoch in range(2):
        order = epoch_order(3, epoch, images)
        shown, drawn = [], []
        for step in range(epoch * p.steps_per_epoch, (epoch + 1) * p.steps_per_epoch):
            batches = [TrainSampler(p, 3, rank, step, repeats=repeats) for rank in range(world_size)]
            for n in range(p.accumulation):
                for sampler in batches:
                    shown.append(sampler[n].indices.tolist())
                    drawn.append(sampler[n].start)
        places = [index for batch in shown for index in batch]
        total = p.steps_per_epoch * 12
        assert len(places) == total  # as long as without repeats
        assert sorted(drawn) == list(range(0, total, p.micro_batch))  # every copy has a place of its own to draw from
        counts = {index: places.count(index) for index in order.tolist()}
        expected = {index: min(repeats, max(0, total - repeats * i)) for i, index in enumerate(order.tolist())}
        assert counts == expected
        if p.micro_batch <= 12 // repeats:
            assert all(len(set(batch)) == len(batch) for batch in shown)


def test_repeats_choose_the_images_that_timms_sampler_chooses():
    """timm's own order is put in place of ours: rank r's share of it is a global batch's r-th part."""
    images, world_size, batch = 512, 2, 16
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0)).numpy()
    samplers = [RepeatAugSampler(range(images), world_size, rank, num_repeats=3) for rank in range(world_size)]
    theirs = np.stack([list(sampler) for sampler in samplers]).reshape(world_size, -1, batch)
    ours = repeat_images(order, 3, world_size * batch).reshape(-1, world_size * batch)
    assert len(ours) == theirs.shape[1]
    for step, of_step in enumerate(ours):
        assert sorted(of_step) == sorted(theirs[:, step].reshape(-1))


@pytest.mark.parametrize("at_a_time", [1, 2, 3, 7, 100])
def test_windows_shuffle_shards_and_then_the_images_of_a_few_at_a_time(at_a_time):
    sizes = np.array([5, 9, 1, 4, 0, 12, 6])
    shard_of = np.repeat(np.arange(7), sizes)
    seen = set()
    for seed, epoch in itertools.product(range(2), range(20)):
        order = windowed_order(seed, epoch, ShardWindows(sizes, at_a_time))
        assert sorted(order) == list(range(37))
        changes = [shard for shard, _ in itertools.groupby(shard_of[order])]
        if at_a_time == 1:
            assert len(changes) == len(set(changes))  # one shard after the other
        windows, rest = [], list(shard_of[order])
        while rest:  # a window ends where all of its shards do
            window = set()
            while rest and (not window or any(shard in window for shard in rest)):
                window.add(rest.pop(0))
            windows.append(window)
        assert all(len(window) <= at_a_time for window in windows)
        seen.add(tuple(order))
    assert len(seen) == 40


def test_a_sampler_of_windows_serves_every_image_once_on_any_number_of_ranks():
    shards = ShardWindows(np.array([20, 30, 50]), 2)
    for world_size in (1, 2, 3, 4):
        p = plan(100, 12, 12 // world_size, world_size)
        samplers = [TrainSampler(p, 0, rank, shards=shards) for rank in range(world_size)]
        shown = [index for step in range(p.steps_per_epoch) for s in samplers for index in s[step].indices]
        assert shown == windowed_order(0, 0, shards)[:96].tolist()


def test_what_stands_in_for_an_image_hangs_on_its_place_alone():
    """Not on the cut into micro-batches, the ranks or the step that is begun at; another place draws others."""

    def candidates(sampler, n, i):
        return list(itertools.islice(sampler.candidates(n, i), 6))

    alone = TrainSampler(plan(micro_batch=16, world_size=1), 3, 0)
    found = {i: candidates(alone, 7, i) for i in range(16)}  # in the second epoch
    for rank in range(2):
        shared = TrainSampler(plan(), 3, rank, first_step=6)
        for accumulated, i in itertools.product(range(2), range(4)):
            assert candidates(shared, 2 + accumulated, i) == found[(2 * accumulated + rank) * 4 + i]
    assert [first for first, *_ in found.values()] == alone[7].indices.tolist()
    assert len({tuple(others) for _, *others in found.values()}) == 16
    assert all(0 <= index < 100 for others in found.values() for index in others)

"""The plan's arithmetic by hand, and at its limits."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from torch import nn

from contextual_cnn.analysis.cluster import (
    Cluster,
    Training,
    estimate,
    gradient_bytes,
    possible_counts,
    ring_all_reduce,
)
from contextual_cnn.errors import UserError

TRAINING = Training(
    images=10_050, epochs=10, global_batch=1000, micro_batch=50, bytes_per_image=1e5, gradient_bytes=100_000_000
)
CLUSTER = Cluster(
    images_per_second=500, gpus_per_node=4, intra_node=1e9, inter_node=5e8, overlap=0.5, floor=0, copy=math.inf, price=3
)


def test_one_gpu_has_nobody_to_wait_for():
    """2 s a step, 10 epochs of 10 steps."""
    row = estimate(1, TRAINING, CLUSTER)
    assert (row.step, row.all_reduce, row.efficiency, row.nodes) == (2, 0, 1, 1)
    assert row.days * 86400 == pytest.approx(200)
    assert row.cost == pytest.approx(200 / 3600 * 3)
    assert row.storage == pytest.approx(500 * 1e5)


def test_a_node_by_hand():
    """4 GPUs: 250 images in 0.5 s; 2 * 3/4 * 0.1 GB at 1 GB/s is 0.15 s, half of it may hide.

    The backward pass of 50 images takes 2/3 * 0.1 s = 0.0667 s, less than that half: 0.0833 s are seen.
    """
    row = estimate(4, TRAINING, CLUSTER)
    assert row.compute == pytest.approx(0.5)
    assert row.all_reduce == pytest.approx(0.15)
    assert row.step == pytest.approx(0.5 + 0.15 - 0.1 * 2 / 3)
    assert row.efficiency == pytest.approx(0.5 / (0.65 - 0.2 / 3))
    longer = estimate(4, replace(TRAINING, micro_batch=250), CLUSTER)
    assert longer.step == pytest.approx(0.5 + 0.075)


def test_two_nodes_go_at_the_speed_of_the_link_between_them():
    """8 GPUs: 125 images in 0.25 s; 2 * 7/8 * 0.1 GB at 0.5 GB/s is 0.35 s; 0.0667 s hide."""
    row = estimate(8, TRAINING, CLUSTER)
    assert (row.nodes, row.images_per_gpu) == (2, 125)
    assert row.step == pytest.approx(0.25 + 0.35 - 0.2 / 3)
    assert row.cost == pytest.approx(100 * row.step / 3600 * 8 * 3)
    assert row.storage == pytest.approx(1000 / row.step * 1e5)
    slow_inside = estimate(8, TRAINING, replace(CLUSTER, intra_node=1e8))
    assert slow_inside.all_reduce == pytest.approx(5 * row.all_reduce)


@pytest.mark.parametrize("gpus", [1, 2, 8, 40, 1000])
def test_infinitely_fast_links_scale_perfectly(gpus):
    row = estimate(gpus, TRAINING, replace(CLUSTER, intra_node=math.inf, inter_node=math.inf))
    alone = estimate(1, TRAINING, CLUSTER)
    assert row.efficiency == 1
    assert row.step == pytest.approx(alone.step / gpus)
    assert row.cost == pytest.approx(alone.cost)


def test_a_micro_batch_takes_no_less_than_its_launches():
    """1,000 GPUs: an image each is 2 ms of arithmetic, and 12 ms of launches."""
    row = estimate(1000, TRAINING, replace(CLUSTER, floor=0.012, intra_node=math.inf, inter_node=math.inf))
    assert row.step == pytest.approx(0.012)
    assert row.efficiency == pytest.approx(2 / 12)
    accumulated = estimate(1, replace(TRAINING, micro_batch=5), replace(CLUSTER, floor=0.012))
    assert accumulated.step == pytest.approx(200 * 0.012)  # instead of 2 s


def test_checkpoints_take_their_copy_and_at_most_two_percent():
    """Weights, average and two moments: 0.4 GB at 10 GB/s is 40 ms in an epoch of 10 steps."""
    row = estimate(1, TRAINING, replace(CLUSTER, copy=1e10))
    assert row.checkpoint == pytest.approx(0.004)
    assert row.step == pytest.approx(2.004)
    hurried = estimate(1000, TRAINING, replace(CLUSTER, copy=1e10, intra_node=math.inf, inter_node=math.inf))
    assert hurried.checkpoint == pytest.approx(0.02 * 0.002)


@pytest.mark.parametrize(("gpus", "images"), [(1, 128), (32, 128), (64, 128), (1024, 128)])
def test_a_norm_sees_the_recipes_images(gpus, images):
    training = replace(TRAINING, images=1_281_167, global_batch=4096, micro_batch=128)
    assert estimate(gpus, training, CLUSTER).norm_images == images


def test_nothing_hides_without_overlap_and_a_ring_never_takes_more_than_two_passes():
    row = estimate(8, TRAINING, replace(CLUSTER, overlap=0))
    assert row.step == pytest.approx(row.compute + row.all_reduce)
    assert ring_all_reduce(2, 100, 10) == 10
    assert ring_all_reduce(10**9, 100, 10) == pytest.approx(20)


def test_with_finite_links_more_gpus_are_less_efficient_and_dearer():
    rows = [estimate(gpus, replace(TRAINING, global_batch=1024), CLUSTER) for gpus in (8, 16, 32, 64, 128)]
    for fewer, more in pairwise(rows):
        assert more.cost > fewer.cost
        assert more.efficiency < fewer.efficiency


def test_what_the_batch_does_not_allow_is_refused_with_what_it_does():
    with pytest.raises(UserError, match=r"1001 GPUs.*1000 images") as refused:
        estimate(1001, TRAINING, CLUSTER)
    assert "1000 GPUs" in refused.value.fix
    with pytest.raises(UserError, match=r"\b48 GPUs") as refused:
        estimate(48, TRAINING, CLUSTER)
    assert refused.value.fix == "--gpus 40"
    with pytest.raises(UserError, match="0 GPUs"):
        estimate(0, TRAINING, CLUSTER)
    assert possible_counts(4096) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert possible_counts(1000) == [1, 2, 4, 8]


@pytest.mark.parametrize("wrong", [{"overlap": 1.5}, {"intra_node": 0.0}, {"images_per_second": math.nan}])
def test_what_no_cluster_can_be_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        replace(CLUSTER, **wrong)


def test_gradient_bytes_are_those_of_what_is_trained():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2).requires_grad_(False))
    assert gradient_bytes(model) == 4 * (3 * 5 + 5)

"""Draws: their distribution, their independence of how they are cut into batches; timm's mixing behind them."""

import numpy as np
import pytest
import torch
from timm.data.transforms import RandomResizedCropAndInterpolation

from contextual_cnn.contracts import Batch
from contextual_cnn.data.augmentation import ATTEMPTS, Augmentation, BatchAugmentation, draw
from contextual_cnn.data.sampler import MicroBatch
from contextual_cnn.errors import UserError
from contextual_cnn.randomness import Purpose, seed_all
from tests import reference


def batch(start, count, epoch=0):
    return MicroBatch(epoch, start, np.arange(start, start + count))


def test_an_images_draws_do_not_depend_on_the_batch_it_is_in():
    whole = draw(Augmentation(), 5, batch(0, 40))
    part = draw(Augmentation(), 5, batch(12, 8))
    for name in ("height", "width", "place", "flip"):
        assert (getattr(whole, name)[12:20] == getattr(part, name)).all()
    assert (draw(Augmentation(), 5, batch(0, 40, epoch=1)).place != whole.place).any()
    assert (draw(Augmentation(), 6, batch(0, 40)).place != whole.place).any()


def kolmogorov_smirnov(a, b):
    """sqrt(nm/(n+m)) times the largest distance of two empirical distributions; 1.95 is the 99.9 % line."""
    grid = np.concatenate([a, b])
    distance = np.abs(
        np.searchsorted(np.sort(a), grid, "right") / len(a) - np.searchsorted(np.sort(b), grid, "right") / len(b)
    ).max()
    return distance * np.sqrt(len(a) * len(b) / (len(a) + len(b)))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (60, 300)])
def test_crops_are_distributed_as_timms(height, width):
    import random

    random.seed(0)
    from PIL import Image

    image, count = Image.new("RGB", (width, height)), 4000
    timms = np.array(
        [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)], float
    )
    draws = draw(Augmentation(), 0, batch(0, count))
    ours = np.array(
        [
            reference.random_resized_crop(
                height, width, zip(draws.height[i], draws.width[i], strict=True), draws.place[i], (3 / 4, 4 / 3)
            )
            for i in range(count)
        ],
        float,
    )
    for i in range(4):
        jitter = np.random.default_rng(i).random((2, count))  # whole pixels tie; the same noise unties both
        assert kolmogorov_smirnov(ours[:, i] + jitter[0], timms[:, i] + jitter[1]) < 1.95
    assert abs(draws.flip.mean() - 0.5) < 0.03
    assert draws.height.shape == (count, ATTEMPTS)


def test_mixing_gives_timms_soft_targets_and_is_seeded_by_the_micro_batch():
    augment = BatchAugmentation(Augmentation(erasing=0.5), num_classes=5, device=torch.device("cpu"))
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    results = []
    for key in ((0, 1), (0, 1), (0, 2)):
        seed_all(Purpose.MICRO_BATCH, *key)
        results.append(augment(Batch(images.clone(), targets)))
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].targets, results[1].targets)
    assert not torch.equal(results[0].images, results[2].images)
    torch.testing.assert_close(results[0].targets.sum(dim=1), torch.ones(8))
    assert results[0].targets.min().item() == pytest.approx(0.1 / 5)


def test_smoothing_alone_mixes_nothing_and_nothing_at_all_keeps_hard_targets():
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    off = dict(erasing=0.0, mixup=0.0, cutmix=0.0)
    smoothed = BatchAugmentation(Augmentation(**off), 5, torch.device("cpu"))(Batch(images.clone(), targets))
    assert torch.equal(smoothed.images, images)
    assert smoothed.targets.max().item() == pytest.approx(0.92)
    plain = BatchAugmentation(Augmentation(**off, label_smoothing=0.0), 5, torch.device("cpu"))(Batch(images, targets))
    assert torch.equal(plain.targets, targets)


@pytest.mark.parametrize("wrong", [dict(hflip=1.5), dict(erasing=-0.1), dict(scale=[0.5, 0.1]), dict(ratio=[0.0, 1.0])])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Augmentation(**wrong)


def test_odd_micro_batches_cannot_be_mixed():
    with pytest.raises(UserError, match="even"):
        Augmentation().check_micro_batch(7)
    Augmentation(mixup=0.0, cutmix=0.0, label_smoothing=0.0).check_micro_batch(7)

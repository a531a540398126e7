"""Draws: their distribution, their independence of how they are cut into batches; timm's mixing behind them."""

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from contextual_cnn.contracts import Batch
from contextual_cnn.data.augmentation import ATTEMPTS, Augmentation
from contextual_cnn.data.mixing import BatchAugmentation
from contextual_cnn.data.random_erasing import erase_randomly
from contextual_cnn.data.sampler import MicroBatch
from contextual_cnn.errors import UserError
from contextual_cnn.randomness import Places, Purpose, seed_all
from contextual_cnn.settings.augment import AugmentSettings
from tests.helpers import reference


def batch(start, count, epoch=0):
    return MicroBatch(epoch, start, np.arange(start, start + count))


def test_an_images_draws_do_not_depend_on_the_batch_it_is_in():
    whole = Augmentation(AugmentSettings(), 5).draw(batch(0, 40))
    part = Augmentation(AugmentSettings(), 5).draw(batch(12, 8))
    for name in ("height", "width", "place", "flip"):
        assert (getattr(whole, name)[12:20] == getattr(part, name)).all()
    assert (Augmentation(AugmentSettings(), 5).draw(batch(0, 40, epoch=1)).place != whole.place).any()
    assert (Augmentation(AugmentSettings(), 6).draw(batch(0, 40)).place != whole.place).any()


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
    draws = Augmentation(AugmentSettings(), 0).draw(batch(0, count))
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


def erased_boxes(erase, images, side=32):
    """(n, 4) top, left, height, width of the rectangles, and the noise; every image is erased by itself or not."""
    batch = erase(torch.full((images, 3, side, side), 9.0).contiguous(memory_format=torch.channels_last))
    changed = batch != 9
    assert (changed.any(dim=1) == changed.all(dim=1)).all()  # all channels or none
    boxes = []
    for mask in changed[:, 0].numpy():
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            boxes.append((rows[0], columns[0], len(rows), len(columns)))
            assert mask.sum() == len(rows) * len(columns)
    return np.array(boxes, float), batch[changed]


def test_erasing_is_distributed_as_timms():
    import random

    random.seed(0)
    n = 6000
    theirs, _ = erased_boxes(RandomErasing(0.25, mode="pixel", device="cpu"), n)
    ours, noise = erased_boxes(lambda images: erase_randomly(images, 0.25, Places(0, 0, 0, n)), n)
    for boxes in (ours, theirs):
        assert len(boxes) / n == pytest.approx(0.25, abs=0.02)
    jitter = np.random.default_rng(0)
    measures = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 2] / b[:, 3],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
    }
    for name, measure in measures.items():
        both = [measure(b) + 1e-3 * jitter.random(len(b)) for b in (ours, theirs)]
        assert kolmogorov_smirnov(*both) < 1.95, name
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_erasing_never_and_always():
    images = torch.ones(4, 3, 32, 32)
    assert torch.equal(erase_randomly(images.clone(), 0.0, Places(0, 0, 0, 4)), images)
    assert (erase_randomly(images.clone(), 1.0, Places(0, 0, 0, 4)) != images).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("draws", [1, 2])
def test_mixing_gives_timms_soft_targets_and_is_seeded_by_the_step(draws):
    augment = BatchAugmentation(AugmentSettings(erasing=0.5), num_classes=5)
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    results = []
    for step in (1, 1, 2):
        seed_all(Purpose.MICRO_BATCH, 0, step)
        places = Places(0, step, first=0, count=8) if draws > 1 else None
        results.append(augment(Batch(images.clone(), targets), places))
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].targets, results[1].targets)
    assert not torch.equal(results[0].images, results[2].images)
    torch.testing.assert_close(results[0].targets.sum(dim=1), torch.ones(8))
    assert results[0].targets.min().item() == pytest.approx(0.1 / 5)


@pytest.mark.parametrize(("mode", "shares"), [("batch", 1), ("pair", 4), ("elem", 8)])
def test_mixing_can_be_drawn_for_each_image(mode, shares):
    augment = BatchAugmentation(AugmentSettings(erasing=0.0, label_smoothing=0.0, cutmix=0.0, mix_mode=mode), 8)
    mixed = augment(Batch(torch.randn(8, 3, 32, 32), torch.arange(8)), Places(0, 0, 0, 8))
    assert (
        len({round(float(share), 5) for share in mixed.targets.diagonal().minimum(1 - mixed.targets.diagonal())})
        == shares
    )


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("micro_batch", [2, 6, 24, 96, 128, 192, 384])
def test_what_is_drawn_for_a_place_does_not_depend_on_the_micro_batch(mode, micro_batch):
    """Bit for bit, erased and mixed: also where a micro-batch ends within a group of 128 places, or spans several."""
    augment = BatchAugmentation(AugmentSettings(erasing=0.5, mix_mode=mode), num_classes=5)
    draw = torch.Generator().manual_seed(0)
    images, targets = torch.randn(384, 3, 8, 8, generator=draw), torch.arange(384) % 5
    whole = augment(Batch(images.clone(), targets), Places(7, 3, 0, 384))
    parts = [
        augment(
            Batch(images[first : first + micro_batch].clone(), targets[first : first + micro_batch]),
            Places(7, 3, first, micro_batch),
        )
        for first in range(0, 384, micro_batch)
    ]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert len(whole.targets.unique(dim=0)) > 10


def test_places_share_a_draw_where_the_recipe_mixes_batch_by_batch():
    augment = BatchAugmentation(AugmentSettings(erasing=0.0, label_smoothing=0.0, cutmix=0.0), num_classes=256)
    mixed = augment(Batch(torch.randn(256, 3, 4, 4), torch.arange(256)), Places(0, 0, 0, 256))
    shares = mixed.targets.diagonal()
    partners = torch.arange(256) ^ 1  # neighbours
    torch.testing.assert_close(mixed.targets[torch.arange(256), partners], 1 - shares)
    assert len(shares[:128].unique()) == len(shares[128:].unique()) == 1
    assert shares[0] != shares[128]


def test_smoothing_alone_mixes_nothing_and_nothing_at_all_keeps_hard_targets():
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    off = dict(erasing=0.0, mixup=0.0, cutmix=0.0)
    places = Places(0, 0, 0, 8)
    smoothed = BatchAugmentation(AugmentSettings(**off), 5)(Batch(images.clone(), targets), places)
    assert torch.equal(smoothed.images, images)
    assert smoothed.targets.max().item() == pytest.approx(0.92)
    plain = BatchAugmentation(AugmentSettings(**off, label_smoothing=0.0), 5)(Batch(images, targets), places)
    assert torch.equal(plain.targets, targets)


@pytest.mark.parametrize(
    "wrong",
    [
        *(dict(hflip=1.5), dict(erasing=-0.1), dict(scale=[0.5, 0.1]), dict(ratio=[0.0, 1.0])),
        *(dict(randaugment="rand-m9"), dict(color_jitter=-1.0)),
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        AugmentSettings(**wrong)


def test_odd_micro_batches_cannot_be_mixed():
    with pytest.raises(UserError, match="even"):
        AugmentSettings().check_micro_batch(7)
    AugmentSettings(mixup=0.0, cutmix=0.0, label_smoothing=0.0).check_micro_batch(7)

"""RandAugment and color jitter: what is drawn against timm's and torchvision's rules, the pixels against PIL's."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from timm.data import auto_augment as timm_ops
from torchvision.transforms import ColorJitter as TorchvisionColorJitter
from torchvision.transforms import functional

from contextual_cnn.data.randaugment import ColorJitter, ImageOps, RandAugment, dali_ops, pil_ops, torch_ops
from contextual_cnn.data.randaugment.policy import ARGUMENT, GEOMETRY, Op, fill_color
from contextual_cnn.errors import UserError
from contextual_cnn.settings.augment import RandAugmentNumbers, parse_randaugment

OPS = list(ARGUMENT)
POINTWISE = [op for op in OPS if op not in GEOMETRY]
FILL = fill_color((0.485, 0.456, 0.406))
SIZE = 112


@pytest.fixture(scope="module")
def crops(photos):
    """Six parts of photographs, (112, 112, 3), some of them magnified."""
    rng = np.random.default_rng(0)
    parts = []
    for i in range(6):
        side = rng.integers(120, 400)
        top, left = rng.integers(0, 427 - side), rng.integers(0, 640 - side)
        part = Image.fromarray(photos[i % 2][top : top + side, left : left + side])
        parts.append(np.array(part.resize((SIZE, SIZE), Image.BICUBIC)))
    return parts


@pytest.fixture(scope="module")
def degenerate():
    rng = np.random.default_rng(1)
    flat = [np.full((SIZE, SIZE, 3), level, dtype=np.uint8) for level in (0, 1, 77, 128, 255)]
    two_valued = np.where(rng.random((SIZE, SIZE, 1)) < 0.5, [30, 220, 23], [20, 20, 20]).astype(np.uint8)
    almost_flat = flat[2].copy()
    almost_flat[:10, :30] = [80, 70, 255]
    return [*flat, two_valued, almost_flat, rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)]


def one_op(op, level, sign, images):
    """The same operation for every image."""
    argument = float(ARGUMENT[op](np.float64(level) / 10, sign))
    return ImageOps(np.full((images, 1), int(op)), np.full((images, 1), argument))


def joined(parts):
    return ImageOps(np.concatenate([part.op for part in parts]), np.concatenate([part.argument for part in parts]))


def by_pil(images, ops, interpolation):
    done = [
        pil_ops.apply_ops(Image.fromarray(image), op, argument, fill=FILL, interpolation=interpolation)
        for image, op, argument in zip(images, ops.op, ops.argument, strict=True)
    ]
    return np.stack([np.array(image) for image in done])


def by_torch(images, ops, interpolation):
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return torch_ops.apply_ops(batch, ops, fill=FILL, interpolation=interpolation).permute(0, 2, 3, 1).numpy()


def by_dali(images, ops, interpolation, threads=2):
    @pipeline_def(enable_conditionals=True)
    def pipeline():
        inputs = [(types.UINT8, 3), *dali_ops.INPUTS]
        nodes = fn.external_source(
            lambda: (list(images), *dali_ops.inputs(ops, SIZE)),
            num_outputs=len(inputs),
            dtype=[dtype for dtype, _ in inputs],
            ndim=[ndim for _, ndim in inputs],
            layout=["HWC", None, None, None, None],
        )
        layers = ops.op.shape[1]
        return dali_ops.apply_ops(
            nodes[0], nodes[1:], layers, size=SIZE, fill=FILL, interpolation=interpolation, on="cpu"
        )

    built = pipeline(batch_size=len(images), num_threads=threads, device_id=None, prefetch_queue_depth=1)
    return np.stack([np.array(image) for image in built.run()[0]])


def errors(ours, theirs):
    """Mean and largest difference of each image, in levels."""
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    return difference.mean(axis=(1, 2, 3)), difference.max(axis=(1, 2, 3))


def every_case(images, ops, levels):
    """(names, images repeated, their operations), for a single run over all of it."""
    cases = [(op, level, sign) for op in ops for level in levels for sign in (-1, 1)]
    names = [case for case in cases for _ in images]
    return names, list(images) * len(cases), joined([one_op(*case, len(images)) for case in cases])


def test_arguments_are_timms():
    for op in OPS:
        name = op.name.title().replace("_", "")
        name = f"{name}Rel" if name.startswith("Translate") else name
        name = f"{name}Increasing" if f"{name}Increasing" in timm_ops.LEVEL_TO_ARG else name
        function = timm_ops.LEVEL_TO_ARG[name]
        for level in np.linspace(0, 10, 83):
            for sign, drawn in ((-1, 0.9), (1, 0.1)):
                if function is not None:
                    with mock.patch("random.random", return_value=drawn):
                        (theirs,) = function(level, {})
                    assert float(ARGUMENT[op](level / 10, sign)) == theirs, (op, level, sign)


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8-inc1", "rand-inc1-mstd1"])
def test_the_notation_is_timms(text):
    ours, theirs = parse_randaugment(text), timm_ops.rand_augment_transform(text, {})
    (settings,) = {(op.prob, op.magnitude, op.magnitude_std) for op in theirs.ops}
    assert (ours.probability, ours.magnitude, ours.magnitude_std) == settings
    assert ours.layers == theirs.num_layers
    assert len(theirs.ops) == len(OPS)


_REFUSED = ["rand-m9-mstd0.5", "rand-m9-inc0", "augmix-m5", "original", "", "rand-m-inc1"]
_REFUSED += [f"rand-m9-inc1-{section}" for section in ("tweights", "mmax5", "n0", "n1.5", "m11", "p2", "mstd101", "")]


@pytest.mark.parametrize("text", _REFUSED)
def test_what_is_not_supported_is_refused(text):
    with pytest.raises(UserError, match=r"augment\.randaugment"):
        parse_randaugment(text)


def test_draws_are_distributed_as_timms():
    n = 100_000
    ops = RandAugment(RandAugmentNumbers()).draw(0, 0, 0, n)
    applied = (ops.op != Op.NONE).sum(axis=1)
    np.testing.assert_allclose(np.bincount(applied) / n, [0.25, 0.5, 0.25], atol=0.006)
    counts = np.array([(ops.op == op).sum() for op in OPS])
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 36.1  # chi2, 14 degrees of freedom, 99.9 %
    both = ops.op[applied == 2]
    assert (both[:, 0] == both[:, 1]).mean() == pytest.approx(1 / 15, abs=0.007)
    turned = ops.argument[ops.op == Op.ROTATE]
    level = np.sort(np.abs(turned) / 3)
    assert level.mean() == pytest.approx(8.995, abs=0.03)
    assert level.std() == pytest.approx(0.49, abs=0.03)
    assert (level > 9.9999).mean() == pytest.approx(0.0228, abs=0.008)
    below = level[level < 10]  # the clipped ones are a step
    normal = np.array([0.5 * (1 + math.erf((x - 9) / 0.5 / math.sqrt(2))) for x in below])
    distance = np.abs(normal - (np.arange(len(below)) + 0.5) / len(level)).max()
    assert distance * math.sqrt(len(level)) < 1.95  # Kolmogorov and Smirnov, 99.9 %
    assert (turned > 0).mean() == pytest.approx(0.5, abs=0.03)


def test_an_images_draws_depend_on_its_place_in_the_epoch_alone():
    for policy in (RandAugment(RandAugmentNumbers()), RandAugment(RandAugmentNumbers(layers=3)), ColorJitter(0.4)):
        whole, part = policy.draw(3, 1, 0, 40), policy.draw(3, 1, 12, 8)
        assert (whole.op[12:20] == part.op).all()
        assert (whole.argument[12:20] == part.argument).all()
        assert (policy.draw(3, 2, 0, 40).argument != whole.argument).any()
        assert (policy.draw(4, 1, 0, 40).argument != whole.argument).any()


def test_color_jitter_is_torchvisions(crops):
    n, transform = 20_000, TorchvisionColorJitter(0.4, 0.4, 0.4)
    ops = ColorJitter(0.4).draw(0, 0, 0, n)
    assert (np.sort(ops.op, axis=1) == sorted([Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR])).all()
    orders = np.unique(ops.op, axis=0, return_counts=True)[1]
    assert len(orders) == 6
    assert ((orders - n / 6) ** 2 / (n / 6)).sum() < 20.5  # chi2, 5 degrees of freedom, 99.9 %
    assert (transform.brightness, transform.contrast, transform.saturation) == ((0.6, 1.4),) * 3
    shares = np.sort((ops.argument - 0.6) / 0.8, axis=0)
    assert np.abs(shares - (np.arange(n) + 0.5)[:, None] / n).max() * math.sqrt(n) < 1.95

    adjust = {
        Op.BRIGHTNESS: functional.adjust_brightness,
        Op.CONTRAST: functional.adjust_contrast,
        Op.COLOR: functional.adjust_saturation,
    }
    few = ColorJitter(0.4).draw(1, 0, 0, len(crops))
    for crop, op, argument, ours in zip(crops, few.op, few.argument, by_torch(crops, few, "bilinear"), strict=True):
        image = Image.fromarray(crop)
        for kind, factor in zip(op, argument, strict=True):
            image = adjust[kind](image, factor)
        assert (np.array(image) == ours).all()
    mean, largest = errors(by_dali(crops, few, "bilinear"), by_pil(crops, few, "bilinear"))
    assert mean.max() < 0.02  # a single level off in one layer is stretched by the next
    assert largest.max() <= 2


def test_torchs_levels_are_exactly_pils(crops, degenerate):
    names, images, ops = every_case([*crops[:2], *degenerate], POINTWISE, (4.7, 10))
    _, largest = errors(by_torch(images, ops, "bilinear"), by_pil(images, ops, "bilinear"))
    for name, most in zip(names, largest, strict=True):
        assert most == 0, name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_torchs_geometry_is_pils(crops, interpolation):
    names, images, ops = every_case(crops[:2], GEOMETRY, (4.7, 10))
    mean, largest = errors(by_torch(images, ops, interpolation), by_pil(images, ops, interpolation))
    assert largest.max() <= 1  # float64 on both sides, but not the same compiler
    for name, m in zip(names, mean, strict=True):
        assert m < 1e-4, name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_dalis_pixels_are_pils_within_the_stated_bounds(crops, interpolation):
    # DALI makes a bicubic pixel of sixteen warps
    which, some = (OPS, crops) if interpolation == "bilinear" else (GEOMETRY, crops[:3])
    names, images, ops = every_case(some, which, (4.7, 9, 9.63))
    mean, largest = errors(by_dali(images, ops, interpolation), by_pil(images, ops, interpolation))
    for op in which:
        of_op = [name[0] == op for name in names]
        assert mean[of_op].mean() < (0.5 if op == Op.EQUALIZE else 0.01), op
        if op in POINTWISE:
            assert largest[of_op].max() <= 1, op


def test_bilinear_and_bicubic_geometry_differ_by_a_level_or_two(crops):
    names, images, ops = every_case(crops, GEOMETRY, (9,))
    mean, _ = errors(by_pil(images, ops, "bilinear"), by_pil(images, ops, "bicubic"))
    assert 0.1 < mean.mean() < 2, names


def test_degenerate_images_are_at_most_a_level_off(degenerate):
    names, images, ops = every_case(degenerate, POINTWISE, (9, 10))
    _, largest = errors(by_dali(images, ops, "bilinear"), by_pil(images, ops, "bilinear"))
    for name, most in zip(names, largest, strict=True):
        assert most <= 1, name


def test_no_bits_kept_is_black(crops):
    ops = one_op(Op.POSTERIZE, 10, 1, len(crops))
    assert (ops.argument == 0).all()
    for apply in (by_pil, by_torch, by_dali):
        assert apply(crops, ops, "bilinear").max() == 0


def test_two_layers_of_the_recipe_give_nearly_the_same_image_everywhere(crops):
    images = crops * 10
    ops = RandAugment(RandAugmentNumbers()).draw(7, 0, 0, len(images))
    pil = by_pil(images, ops, "bilinear")
    mean, _ = errors(by_torch(images, ops, "bilinear"), pil)
    assert mean.max() < 1e-3
    dali = by_dali(images, ops, "bilinear")
    mean, _ = errors(dali, pil)
    assert mean.mean() < 0.1
    assert mean[(ops.op == Op.NONE).all(axis=1)].max() == 0
    assert (by_dali(images, ops, "bilinear", threads=1) == dali).all()

"""Both loaders, DALI's pipelines and the torch one, against timm's and PIL's pixels; on the CPU, with real JPEGs."""

import multiprocessing
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data import dali
from contextual_cnn.data.augmentation import Augmentation
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.randaugment import pil_ops
from contextual_cnn.data.randaugment.policy import fill_color
from contextual_cnn.data.sampler import TrainSampler
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from tests.helpers import reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


LOADERS = ("dali", "torch")


@pytest.fixture(params=LOADERS)
def loader(request):
    """Whatever holds for one loader holds for the other."""
    return request.param


def world(rank=0, size=1):
    return World(rank, size, rank, CPU)


def pixels(images):
    """Normalised (B, 3, H, W) -> levels 0..255."""
    return (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def write(root, images, split="val"):
    """One class, images in order; returns the root."""
    for folder in ("train", "val"):
        (root / folder / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[0]).save(root / folder / "a" / "00.png")
    for i, image in enumerate(images):
        Image.fromarray(image).save(root / split / "a" / f"{i:02d}.png")
    return root


def crop(photo, height, width):
    return (
        photo[:height, :width]
        if height <= photo.shape[0] and width <= photo.shape[1]
        else np.array(Image.fromarray(photo).resize((width, height)))
    )


@pytest.mark.parametrize(
    "sizes", [[(375, 500), (333, 500), (500, 375), (500, 334), (256, 341), (427, 640)], [(97, 211), (301, 299)]]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_timms_transform(tmp_path, photos, sizes, loader, interpolation):
    images = [crop(photos[i % 2], *size) for i, size in enumerate(sizes)]
    options = dict(threads=1, eval_batch_size=4, loader=loader, interpolation=interpolation)
    data = ImageData(DataSettings(root=str(write(tmp_path, images)), **options))
    ours = pixels(torch.cat([batch.images for batch in data.evaluation_batches(world())]))
    transform = create_transform(224, interpolation=interpolation, crop_pct=0.875, mean=MEAN, std=STD)
    theirs = pixels(torch.stack([transform(Image.fromarray(image)) for image in images]))
    error = (ours - theirs).abs().mean(dim=(1, 2, 3))
    # DALI's images are resized by torch, with rounder weights; one pixel off would be 5
    assert error.max() < (0.01 if loader == "dali" else 1e-4), error


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_crops_are_those_that_were_drawn(tmp_path, photos, loader, interpolation):
    sizes = [(375, 500), (500, 333), (60, 300), (300, 60), (90, 90), (427, 640)]
    images = [crop(photos[i % 2], *size) for i, size in enumerate(sizes)]
    root, kind = write(tmp_path, images, "train"), Image.Resampling[interpolation.upper()]
    data = ImageData(DataSettings(root=str(root), threads=1, loader=loader, interpolation=interpolation))
    augmentation = AugmentSettings(scale=(0.3, 1.0), ratio=(0.8, 1.25), randaugment=None, color_jitter=0.0)
    plan = BatchPlan.make(images=6, global_batch=6, micro_batch=6, world_size=1)
    batches, sampler = data.train_batches(plan, augmentation, 1, world(), 0), TrainSampler(plan, 1, 0)
    for n in range(4):
        batch, drawn_for = next(batches), sampler[n]
        draws = Augmentation(augmentation, 1).draw(drawn_for)
        for i, index in enumerate(drawn_for.indices):
            top, left, h, w = reference.random_resized_crop(
                *sizes[index], zip(draws.height[i], draws.width[i], strict=True), draws.place[i], (0.8, 1.25)
            )
            piece = Image.fromarray(images[index][top : top + h, left : left + w]).resize((224, 224), kind)
            expected = torch.from_numpy(np.array(piece)).permute(2, 0, 1).float()
            expected = expected.flip(2) if draws.flip[i] else expected
            assert (pixels(batch.images[i]) - expected).abs().mean() < 0.3  # another place or size would be over 5


@pytest.mark.parametrize("augmentation", [AugmentSettings(), AugmentSettings(randaugment=None)], ids=["rand", "jitter"])
def test_training_images_are_what_pil_makes_of_the_same_draws(tmp_path, photos, augmentation):
    """From one undistorted crop on, so that the resize, which is not PIL's to the last level, has no part in it."""
    images = [crop(photos[i % 2][40 * i :, 60 * i :], 128, 128) for i in range(4)]
    root = write(tmp_path, images, "train")
    augmentation = replace(augmentation, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    plan = BatchPlan.make(images=4, global_batch=4, micro_batch=4, world_size=1)
    ours = {
        (loader, on): ImageData(
            DataSettings(root=str(root), image_size=128, threads=2, loader=loader, randaugment_on=on)
        ).train_batches(plan, augmentation, 2, world(), 0)
        for loader in LOADERS
        for on in ("loader", "device")
    }
    sampler = TrainSampler(plan, 2, 0)
    for n in range(8):
        batches, draws = (
            {key: next(batches) for key, batches in ours.items()},
            Augmentation(augmentation, 2).draw(sampler[n]),
        )
        for batch in batches.values():
            assert torch.equal(batch.targets, batches["dali", "loader"].targets)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for i, index in enumerate(sampler[n].indices):
            expected = pil_ops.apply_ops(
                Image.fromarray(images[index]),
                draws.ops.op[i],
                draws.ops.argument[i],
                fill=fill_color(MEAN),
                interpolation="bilinear",
            )
            expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
            expected = expected.flip(2) if draws.flip[i] else expected
            for key, batch in batches.items():
                bound = 1 if key == ("dali", "loader") else 1e-3
                assert (pixels(batch.images[i]) - expected).abs().mean() < bound, key


def test_batches_are_channels_last_with_targets_of_their_class(image_root, loader):
    data = ImageData(DataSettings(root=str(image_root), image_size=64, threads=1, loader=loader))
    plan = BatchPlan.make(images=48, global_batch=16, micro_batch=8, world_size=1)
    batch = next(data.train_batches(plan, AugmentSettings(), 0, world(), 0))
    indices = TrainSampler(plan, 0, 0)[0].indices
    assert batch.images.shape == (8, 3, 64, 64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.targets.tolist() == (indices // 8).tolist()


def test_batches_depend_on_neither_threads_nor_start_nor_ranks(image_root, loader):
    plan = BatchPlan.make(images=48, global_batch=16, micro_batch=8, world_size=1)
    shared = BatchPlan.make(images=48, global_batch=16, micro_batch=8, world_size=2)

    def read(count, threads=1, plan=plan, rank=0, first_step=0):
        data = ImageData(DataSettings(root=str(image_root), image_size=64, threads=threads, loader=loader))
        batches = data.train_batches(plan, AugmentSettings(), 0, world(rank, plan.world_size), first_step)
        return [next(batches) for _ in range(count)]

    straight = read(8)
    assert not torch.equal(straight[0].images, straight[6].images)  # another epoch
    for ours, theirs in zip(straight, read(8, threads=2), strict=True):
        assert torch.equal(ours.images, theirs.images)
    for ours, theirs in zip(straight[6:], read(2, first_step=3), strict=True):
        assert torch.equal(ours.images, theirs.images)
    by_rank = [read(2, plan=shared, rank=rank) for rank in range(2)]
    for n in range(4):
        assert torch.equal(straight[n].images, by_rank[n % 2][n // 2].images)
        assert torch.equal(straight[n].targets, by_rank[n % 2][n // 2].targets)


@pytest.mark.parametrize(("world_size", "limit"), [(1, None), (2, None), (3, None), (3, 2)])
def test_evaluation_shows_every_image_once_in_every_pass(image_root, world_size, limit, loader):
    """Also where there are more processes than images."""
    options = dict(image_size=32, threads=1, eval_batch_size=4, loader=loader, limit=limit)
    data = ImageData(DataSettings(root=str(image_root), **options))
    loaders = [data.evaluation_batches(world(rank, world_size)) for rank in range(world_size)]
    for _ in range(3):
        targets = [t for loader in loaders for batch in loader for t in batch.targets.tolist()]
        assert sorted(targets) == sorted(data.sources["val"].targets.tolist())
        assert len(targets) == (limit or 18)


def test_exif_does_not_turn_an_image(tmp_path, photos, loader):
    root = write(tmp_path, [crop(photos[0], 300, 400)])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned, straight = root / "val" / "a" / "00.jpg", root / "val" / "a" / "01.jpg"
    (root / "val" / "a" / "00.png").unlink()
    Image.fromarray(crop(photos[0], 300, 400)).save(turned, exif=exif)
    Image.fromarray(crop(photos[0], 300, 400)).save(straight)
    data = ImageData(DataSettings(root=str(root), threads=1, loader=loader))
    (batch,) = data.evaluation_batches(world())
    assert torch.equal(batch.images[0], batch.images[1])


def test_grey_cmyk_and_mislabelled_images_have_three_channels(tmp_path, photos, loader):
    root = write(tmp_path, [crop(photos[0], 300, 400)])
    image = Image.fromarray(crop(photos[0], 300, 400))
    for i, mode in enumerate(("L", "CMYK", "RGB"), start=1):
        image.convert(mode).save(root / "val" / "a" / f"{i:02d}.jpg")
    image.save(root / "val" / "a" / "04.JPEG", format="PNG")
    data = ImageData(DataSettings(root=str(root), image_size=64, threads=1, loader=loader))
    (batch,) = data.evaluation_batches(world())
    assert batch.images.shape == (5, 3, 64, 64)
    assert (pixels(batch.images[1:]) - pixels(batch.images[:1])).abs().mean() < 30


def test_both_loaders_make_the_same_batches_of_the_same_draws(image_root):
    """The whole recipe on JPEGs: the same images, classes, crops and operations; pixels but for these operations."""
    plan = BatchPlan.make(images=48, global_batch=16, micro_batch=8, world_size=1)
    both = [
        ImageData(DataSettings(root=str(image_root), image_size=64, threads=1, loader=loader)).train_batches(
            plan, AugmentSettings(), 0, world(), 0
        )
        for loader in LOADERS
    ]
    differences = []
    for _ in range(6):
        by_dali, by_torch = (next(batches) for batches in both)
        assert torch.equal(by_dali.targets, by_torch.targets)
        differences += (pixels(by_dali.images) - pixels(by_torch.images)).abs().mean(dim=(1, 2, 3)).tolist()
    assert np.median(differences) < 1e-4  # the same crops, resized by the same function
    assert max(differences) < 0.5  # equalized


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_graphs_can_be_traced_for_a_gpu(interpolation):
    """Which is all that a machine without one can do with them; images must not leave the GPU for Python."""
    settings = DataSettings(root="", interpolation=interpolation)
    options = dict(on="cuda", batch_size=4, num_threads=1, device_id=0)
    with (
        mock.patch.object(dali.fn, "resize", wraps=dali.fn.resize) as resize,
        mock.patch.object(dali.fn, "python_function", side_effect=AssertionError),
    ):
        dali._train_pipeline(lambda info: None, settings, AugmentSettings(), layers=2, crops_alone=False, **options)
        dali._evaluation_pipeline(lambda info: None, settings, **options)
    kind = {"bicubic": dali.types.INTERP_CUBIC, "bilinear": dali.types.INTERP_LINEAR}[interpolation]
    assert [call.kwargs["interp_type"] for call in resize.call_args_list] == [kind, kind]


@pytest.mark.parametrize("damage", ["empty", "cut", "gone"])
def test_the_torch_loader_names_an_image_that_it_cannot_read(tmp_path, photos, damage):
    root = write(tmp_path, [crop(photos[0], 100, 100)])
    path = root / "val" / "a" / "00.png"
    data = ImageData(DataSettings(root=str(root), image_size=64, threads=1, loader="torch", on_bad_image="stop"))
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 500])
    others = set(multiprocessing.active_children())
    with pytest.raises(UserError, match=r"val/a/00\.png") as error:
        next(iter(data.evaluation_batches(world())))
    assert "data.exclude" in error.value.fix
    assert set(multiprocessing.active_children()) <= others  # the worker has ended, while the error is still there


def test_without_dali_the_package_and_the_other_loader_are_named(image_root, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "contextual_cnn.data.dali", raising=False)
    monkeypatch.delattr("contextual_cnn.data.dali", raising=False)
    with pytest.raises(UserError, match="DALI") as refused:
        ImageData(DataSettings(root=str(image_root))).evaluation_batches(World(0, 1, 0, CPU))
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "data.loader=torch"):
        assert name in refused.value.fix

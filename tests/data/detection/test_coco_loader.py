"""Batches of scenes: what is in them, and what becomes of images that cannot be used."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.detection.annotations import open_coco
from contextual_cnn.data.detection.coco_data import CocoData
from contextual_cnn.data.detection.coco_loader import training_scene
from contextual_cnn.data.sampler import AlikeGroups, TrainSampler, grouped_order
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.settings.coco import CocoSettings
from contextual_cnn.settings.scale_augment import ScaleAugmentSettings
from tests.helpers.scenes import ANNOTATIONS, IMAGES, write_scenes, write_split

AUGMENT = ScaleAugmentSettings(short_sides=[48, 60], longest=100, crop_short_sides=[50], crop_sides=[30, 50])


def process(rank, size):
    return World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))


ALONE = process(0, 1)


def data_of(root, **options):
    settings = CocoSettings(root=str(root), threads=1, short_side=60, longest=100, **options)
    return CocoData(settings)


def first_batches(data, number, *, micro_batch=2, seed=0, first_step=0):
    plan = BatchPlan.make(images=len(data.sources["train"]), global_batch=2, micro_batch=micro_batch, world_size=1)
    batches = data.train_batches(plan, AUGMENT, seed, ALONE, first_step)
    try:
        return [next(batches) for _ in range(number)]
    finally:
        batches.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def test_a_scene_is_the_image_and_its_objects_without_the_crowd(root):
    images = open_coco(root, "train")
    scene = training_scene(images, 2)
    assert scene.boxes.tolist() == [[0, 0, 20, 60]]
    assert scene.labels.tolist() == [0]
    assert scene.masks[0, :, :20].all()
    assert not scene.masks[0, :, 20:].any()
    with Image.open(root / "train" / "picture 2.png") as image:
        assert np.array_equal(scene.image.permute(1, 2, 0).numpy(), np.asarray(image))


def test_batches_are_padded_with_zeros_and_count_classes_from_one(root):
    for batch in first_batches(data_of(root, empty_images=True), 4):
        assert batch.size == len(batch.targets) == len(batch.images) == 2
        assert all(side % 32 == 0 for side in batch.images.shape[2:])
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for image, (height, width), target in zip(batch.images, batch.sizes, batch.targets, strict=True):
            assert not image[:, height:].any()
            assert not image[:, :, width:].any()
            assert image[:, :height, :width].any()
            assert target["masks"].shape[1:] == image.shape[1:]
            assert (target["labels"] >= 1).all()
            assert target["boxes"].dtype == torch.float32


def test_the_draws_depend_on_the_place_alone(root):
    data = data_of(root, empty_images=True)
    straight, later = first_batches(data, 4), first_batches(data, 2, first_step=2)
    alone = first_batches(data, 8, micro_batch=1)
    for batch, again in zip(straight[2:], later, strict=True):
        assert torch.equal(batch.images, again.images)
        assert batch.indices == again.indices
    for n, batch in enumerate(straight):
        for i, (height, width) in enumerate(batch.sizes):
            other = alone[2 * n + i]
            assert other.sizes == [(height, width)]
            assert torch.equal(other.images[0, :, :height, :width], batch.images[i, :, :height, :width])
            assert torch.equal(other.targets[0]["boxes"], batch.targets[i]["boxes"])


def test_an_evaluation_shows_every_image_once_at_any_number_of_processes(root):
    data = data_of(root)
    for size in (1, 2, 3):
        seen = []
        for rank in range(size):
            for batch in data.evaluation_batches(process(rank, size)):
                seen += batch.indices
                assert batch.sizes == [(60, 80)]
        assert sorted(seen) == [0, 1, 2, 3]


def test_a_bad_image_and_a_malformed_annotation_are_named_and_replaced(tmp_path, caplog):
    write_split(tmp_path, "val")
    write_split(tmp_path, "train")
    (tmp_path / "train" / "picture 0.png").write_bytes(b"no picture")
    file = tmp_path / "annotations" / "instances_train.json"
    broken = [ANNOTATIONS[0], ANNOTATIONS[1], ANNOTATIONS[2] | {"segmentation": [[1, 2]]}, *ANNOTATIONS[3:]]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": broken}))
    batches = first_batches(data_of(tmp_path, empty_images=True), 4)
    assert {index for batch in batches for index in batch.indices} == {2, 3}
    assert sum(batch.replaced for batch in batches) == 4  # of two epochs
    assert "picture 0.png" in caplog.text
    assert "picture 1.png cannot be used: an annotation's mask cannot be made: a polygon is x, y" in caplog.text


def test_an_image_of_another_size_than_annotated_is_bad(tmp_path):
    write_scenes(tmp_path)
    Image.new("RGB", (30, 30)).save(tmp_path / "val" / "picture 1.png")
    batches = list(data_of(tmp_path).evaluation_batches(ALONE))
    assert [batch.usable for batch in batches] == [[True], [False], [True], [True]]
    with pytest.raises(UserError, match="30 x 30 pixels, and is annotated with 80 x 60"):
        list(data_of(tmp_path, on_bad_image="stop").evaluation_batches(ALONE))


def test_groups_are_of_one_kind_whatever_the_number_of_processes():
    kind = np.random.default_rng(0).random(101) < 0.3
    order = np.random.default_rng(1).permutation(101)
    grouped = grouped_order(5, 3, order, AlikeGroups(kind, 4))
    assert sorted(grouped) == list(range(101))
    whole = (kind.sum() // 4 + (~kind).sum() // 4) * 4
    groups = kind[grouped[:whole]].reshape(-1, 4)
    assert (groups.all(1) | ~groups.any(1)).all()
    assert groups.any()
    assert not groups.all(1).all()
    assert len({tuple(grouped_order(5, epoch, order, AlikeGroups(kind, 4))) for epoch in range(3)}) == 3


def test_processes_share_a_grouped_epoch_as_one_would_have_it():
    kind = np.random.default_rng(0).random(64) < 0.5
    alike = AlikeGroups(kind, 2)
    alone = BatchPlan.make(images=64, global_batch=8, micro_batch=8, world_size=1)
    shared = BatchPlan.make(images=64, global_batch=8, micro_batch=2, world_size=4)
    whole = TrainSampler(alone, 0, 0, alike=alike)
    parts = [TrainSampler(shared, 0, rank, alike=alike) for rank in range(4)]
    for step in range(8):
        together = np.concatenate([part[step].indices for part in parts])
        assert np.array_equal(together, whole[step].indices)


def test_images_are_as_they_lie(root):
    """Names, ids and sizes of the helper's files, which the tests above rely on."""
    assert [image["id"] for image in IMAGES] == open_coco(root, "train").targets.tolist()

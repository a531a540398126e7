"""Data that are nowhere, and parts of data that are."""

import io
import itertools

import pytest
import torch
from PIL import Image

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings

WORLD = World(0, 1, 0, torch.device("cpu"))
PLAN = BatchPlan.make(images=16, global_batch=8, micro_batch=8, world_size=1)


def test_there_is_as_much_noise_as_imagenet_and_of_its_size():
    data = ImageData(DataSettings(root="synthetic", layout="synthetic"))
    train, val = data.sources["train"], data.sources["val"]
    assert (len(train), len(val), data.num_classes) == (1_281_167, 50_000, 1000)
    assert set(val.targets.tolist()) == set(range(1000))
    with Image.open(io.BytesIO(train.read(1_000_000))) as image:
        assert image.size == (500, 375)
    assert 100e3 < len(train.read(5)) < 130e3
    assert train.read(5) == ImageData(DataSettings(root="synthetic", layout="synthetic")).sources["train"].read(5)


@pytest.mark.parametrize("loader", ["dali", "torch", "synthetic"])
def test_every_loader_serves_it_with_its_targets(loader):
    data = ImageData(
        DataSettings(root="synthetic", layout="synthetic", limit=16, loader=loader, image_size=32, threads=1)
    )
    first, second = itertools.islice(data.train_batches(PLAN, AugmentSettings(randaugment=None), 0, WORLD, 0), 2)
    assert first.images.shape == (8, 3, 32, 32)
    assert first.images.std() > 0.2
    assert not torch.equal(first.targets, second.targets)
    (again,) = itertools.islice(data.train_batches(PLAN, AugmentSettings(randaugment=None), 0, WORLD, 1), 1)
    assert torch.equal(again.images, second.images)
    assert torch.equal(again.targets, second.targets)
    targets = torch.cat([batch.targets for batch in data.evaluation_batches(WORLD)])
    assert targets.tolist() == data.sources["val"].targets.tolist()


def test_a_limit_takes_images_from_all_over_each_split(image_root):
    data = ImageData(DataSettings(root=str(image_root), limit=6))
    assert [data.sources["train"].name(i) for i in range(6)] == [f"train/class_{c}/0.JPEG" for c in range(6)]
    assert len(data.sources["val"]) == 6
    assert len(ImageData(DataSettings(root=str(image_root), limit=100)).sources["train"]) == 48
    with pytest.raises(UserError, match="limit"):
        ImageData(DataSettings(root=str(image_root), limit=0))


@pytest.mark.parametrize(
    ("loader", "layout", "warnings"), [("synthetic", "folders", 1), ("dali", "synthetic", 1), ("dali", "folders", 0)]
)
def test_noise_is_announced(image_root, loader, layout, warnings, caplog):
    data = ImageData(DataSettings(root=str(image_root), loader=loader, layout=layout))
    data.log_summary()
    assert [record.levelname for record in caplog.records].count("WARNING") == warnings
    assert data.settings.is_noise == (warnings == 1)

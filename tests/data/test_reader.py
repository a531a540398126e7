"""Reading batches ahead, and what is said of an image that cannot be read."""

import os

import numpy as np
import pytest
import torch

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.reader import BatchReader
from contextual_cnn.data.sources import open_source
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from tests.helpers.layouts import write_layout


def test_batches_hold_the_bytes_of_their_images_in_order(image_root):
    source = open_source(image_root, "train", "folders")
    reader = BatchReader(lambda number: np.arange(number, 48, 5), lambda number, i, index: (i, source.read(index)))
    for number in (0, 1, 2, 1, 4):
        assert reader[number] == [(i, source.read(index)) for i, index in enumerate(range(number, 48, 5))]


@pytest.mark.parametrize("layout", ["folders", "list", "shards"])
@pytest.mark.parametrize("damage", ["vanished", "empty"])
def test_an_image_that_cannot_be_read_is_named(image_root, tmp_path, layout, damage):
    root = write_layout(layout, image_root, tmp_path / "root", shard_images=48)
    data = ImageData(DataSettings(root=str(root), image_size=64, threads=1, on_bad_image="stop"))
    name = data.sources["train"].name(20)
    file = root / name.partition(":")[0]
    if damage == "vanished":
        file.unlink()
    else:
        os.truncate(file, 0)
    plan = BatchPlan.make(images=48, global_batch=48, micro_batch=48, world_size=1)
    augment = AugmentSettings(randaugment=None, color_jitter=0.0)
    batches = data.train_batches(plan, augment, 0, World(0, 1, 0, torch.device("cpu")), 0)
    expected = r"train-000\.tar:" if layout == "shards" else f"{name} cannot be used"
    with pytest.raises(UserError, match=expected) as error:
        next(batches)
    assert "scripts/data/check_data.py" in error.value.fix

"""Runs over images that cannot be read or decoded: 34 kinds, both loaders, all layouts, always to the same batches."""

import errno
import logging
import os
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data import bad_images, reader
from contextual_cnn.data.bad_images import BadImages
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.reader import read_image
from contextual_cnn.data.sampler import TrainSampler
from contextual_cnn.data.sources import open_source
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from tests.helpers.layouts import LAYOUTS, write_layout
from tests.helpers.malformed import BAD, DECODED, changed, encoded

CPU = torch.device("cpu")
CROP_AND_FLIP = AugmentSettings(randaugment=None, color_jitter=0.0)  # RandAugment takes DALI seconds to build
# What shows itself in the decoder only, so that a DALI pipeline ends in its middle
LATE = {
    "half a png": BAD["half a png"],
    "wrong bytes in a png": lambda p: changed(encoded(p, "PNG"), flips=5),
    "short png with its end": lambda p: encoded(p, "PNG")[:8000] + encoded(p, "PNG")[-12:],
}


@pytest.fixture(params=["dali", "torch"])
def loader(request):
    return request.param


def write_kinds(root, photos, kinds, good):
    """One class; the kinds' files, called by their numbers, before `good` ordinary ones. Returns root and names."""
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        images = [make(photos[0]) for make in kinds.values()]
        images += [encoded(np.roll(photos[1], 9 * i, axis=1)) for i in range(good)]
        for i, image in enumerate(images):
            (root / split / "a" / f"{i:02d}.jpg").write_bytes(image)
    return root, {name: f"a/{i:02d}.jpg" for i, name in enumerate(kinds)}


def open_data(root, loader, **options):
    return ImageData(
        DataSettings(**dict(root=str(root), image_size=32, threads=1, loader=loader, eval_batch_size=5) | options)
    )


def train(data, count, world_size=1, rank=0, first_step=0, micro_batch=8, augmentation=CROP_AND_FLIP):
    images = len(data.sources["train"])
    plan = BatchPlan.make(images=images, global_batch=8, micro_batch=micro_batch, world_size=world_size)
    world = World(rank, world_size, rank, CPU)
    return list(islice(data.train_batches(plan, augmentation, 0, world, first_step), count))


def named(caplog):
    return [record.args[1] for record in caplog.records if record.name == bad_images.__name__]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def test_34_kinds_of_images_end_no_run_and_change_no_good_image(tmp_path, photos, loader, caplog):
    """An epoch equals one of a folder where the bad files are copies of those that stand in for them, bit for bit."""
    kinds = DECODED | BAD
    assert len(kinds) == 34
    root, names = write_kinds(tmp_path / "damaged", photos, kinds, good=14)
    data = open_data(root, loader)
    with caplog.at_level(logging.WARNING, "contextual_cnn"):
        damaged = train(data, 6)
    expected = sorted(f"train/{names[kind]}" for kind in BAD)
    assert sorted(named(caplog)) == expected  # once each
    assert sum(batch.replaced for batch in damaged) == len(BAD)

    sampler = TrainSampler(BatchPlan.make(images=48, global_batch=8, micro_batch=8, world_size=1), 0, 0)
    source = data.sources["train"]
    is_bad = [source.name(index) in expected for index in range(48)]
    repaired, _ = write_kinds(tmp_path / "repaired", photos, kinds, good=14)
    for n in range(6):
        for i, index in enumerate(sampler[n].indices):
            if is_bad[index]:
                stands_in = next(candidate for candidate in sampler.candidates(n, i) if not is_bad[candidate])
                (repaired / source.name(index)).write_bytes(source.read(stands_in))
    again = train(open_data(repaired, loader), 6)
    assert_equal(again, damaged)
    assert sum(batch.replaced for batch in again) == 0


def test_batches_do_not_depend_on_what_was_met_before(tmp_path, photos, loader):
    """Resumed at any step, on another number of ranks: where a DALI pipeline ended before, it may end now, or not."""
    root, _ = write_kinds(tmp_path, photos, LATE, good=21)
    straight = train(open_data(root, loader), 5)  # an epoch has 3
    assert_equal(train(open_data(root, loader), 3, first_step=2), straight[2:])
    shared = [train(open_data(root, loader), 2, world_size=2, rank=rank, micro_batch=4) for rank in range(2)]
    alone = train(open_data(root, loader), 4, micro_batch=4)
    assert_equal([shared[n % 2][n // 2] for n in range(4)], alone)


@pytest.mark.parametrize("augment_on", ["loader", "device"])
def test_a_dali_pipeline_outlives_what_it_cannot_decode(tmp_path, photos, caplog, augment_on):
    root, names = write_kinds(tmp_path, photos, LATE, good=13)
    data = open_data(root, "dali", randaugment_on=augment_on)
    with caplog.at_level(logging.WARNING, "contextual_cnn"):
        epochs = train(data, 6, augmentation=AugmentSettings())
    assert sorted(named(caplog)) == sorted(f"train/{name}" for name in names.values())
    assert "truncated" in caplog.text  # why, as PIL tells it
    assert sum(batch.replaced for batch in epochs) == 9  # three epochs
    assert all(batch.images.isfinite().all() for batch in epochs)


def test_evaluation_counts_every_image_and_bad_ones_as_wrong(tmp_path, photos, loader, caplog):
    root, names = write_kinds(tmp_path, photos, BAD | LATE, good=5)
    data = open_data(root, loader)
    passes = data.evaluation_batches(World(0, 1, 0, CPU))
    with caplog.at_level(logging.WARNING, "contextual_cnn"):
        for _ in range(3):
            targets = torch.cat([batch.targets for batch in passes]).tolist()
            assert targets == [-1] * len(names) + [0] * 5
    assert sorted(named(caplog)) == sorted(f"val/{name}" for name in names.values())
    only_good = open_data(root, loader, exclude=str(write_names(tmp_path / "bad.txt", names)))
    clean = torch.cat([batch.images for batch in only_good.evaluation_batches(World(0, 1, 0, CPU))])
    assert torch.equal(torch.cat([batch.images for batch in passes])[-5:], clean)


def write_names(path, names):
    path.write_text("".join(f"{split}/{name}\n" for name in names.values() for split in ("train", "val")))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_that_vanishes_in_mid_epoch_is_replaced(image_root, tmp_path, layout, loader, caplog):
    """In shards it is a shard that loses its end."""
    root = write_layout(layout, image_root, tmp_path / "root", shard_images=24)
    data = open_data(root, loader, prefetch=1)
    plan = BatchPlan.make(images=48, global_batch=8, micro_batch=8, world_size=1)
    lost = int(TrainSampler(plan, 0, 0)[5].indices[0])
    file = root / data.sources["train"].name(lost).partition(":")[0]
    batches = data.train_batches(plan, CROP_AND_FLIP, 0, World(0, 1, 0, CPU), 0)
    before = [next(batches)]
    if layout == "shards":
        os.truncate(file, file.stat().st_size // 8)
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING, "contextual_cnn"):
        before += [next(batches) for _ in range(5)]
    assert str(file.relative_to(root)) in {name.partition(":")[0] for name in named(caplog)}
    assert sum(batch.replaced for batch in before) >= 1
    assert len(before) == 6


@pytest.mark.parametrize("kind", ["html", "half a png"])
def test_stop_ends_the_run_at_the_first(tmp_path, photos, loader, kind):
    root, names = write_kinds(tmp_path, photos, {kind: BAD[kind]}, good=7)
    for read in (lambda data: train(data, 1), lambda data: list(data.evaluation_batches(World(0, 1, 0, CPU)))):
        with pytest.raises(UserError, match=names[kind]) as error:
            read(open_data(root, loader, on_bad_image="stop"))
        assert "scripts/data/check_data.py" in error.value.fix


def test_more_than_the_limit_ends_the_run(tmp_path, photos, loader):
    kinds = {kind: BAD[kind] for kind in ("html", "half", "half a png")}
    root, _ = write_kinds(tmp_path, photos, kinds, good=5)
    train(open_data(root, loader, max_bad_images=3), 2)
    with pytest.raises(UserError, match=r"data\.max_bad_images=2.*train/a/0\d\.jpg") as error:
        train(open_data(root, loader, max_bad_images=2), 2)
    assert "data.max_bad_images" in error.value.fix
    with pytest.raises(UserError, match=r"data\.max_bad_images"):
        open_data(root, loader, max_bad_images=-1)


def test_a_folder_of_bad_images_ends_the_run(tmp_path, photos, loader):
    root, _ = write_kinds(tmp_path, photos, {f"{i}": BAD["html"] for i in range(8)}, good=0)
    with pytest.raises(UserError, match=r"^100 images"):
        train(open_data(root, loader), 1)


class Flaky:
    """A source on a storage that answers the third time."""

    def __init__(self, source, number):
        self.source, self.error, self.calls = source, number, 0

    def read(self, index):
        self.calls += 1
        if self.calls < 3:
            raise OSError(self.error, os.strerror(self.error))
        return self.source.read(index)

    def name(self, index):
        return self.source.name(index)


def test_a_storage_that_does_not_answer_is_asked_again(image_root, monkeypatch):
    waits = []
    monkeypatch.setattr(reader, "time", SimpleNamespace(sleep=waits.append))
    source = open_source(image_root, "train", "folders")
    assert read_image(Flaky(source, errno.EIO), 3) == source.read(3)
    assert len(waits) == 2
    assert 0 < waits[0] < waits[1]


def test_a_name_cannot_forge_a_line_of_the_log(caplog):
    from contextual_cnn.data.bad_images import BadImage

    with caplog.at_level(logging.WARNING, "contextual_cnn"):
        BadImages("skip", 1).report(BadImage("a\nall is well.jpg", "empty file"))
    assert r"a\nall is well.jpg" in caplog.text
    assert len(caplog.text.splitlines()) == 1

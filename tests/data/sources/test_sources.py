"""The three layouts hold the same images: read, batched, resumed, shared out and left out alike."""

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.sampler import TrainSampler
from contextual_cnn.data.sources import find_layout, open_source, write_exclude_list
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from tests.helpers.facts import tells
from tests.helpers.layouts import LAYOUTS, flat_name, write_layout


def world(rank=0, size=1):
    return World(rank, size, rank, torch.device("cpu"))


@pytest.fixture(scope="module")
def roots(image_root, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    return {layout: write_layout(layout, image_root, folder / layout) for layout in LAYOUTS}


def key(layout, name):
    """What an image is called in every layout."""
    if layout == "folders":
        return flat_name(name)
    return name.rpartition("/" if layout == "list" else ":")[2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_found_and_holds_the_same_images(roots, layout):
    root, folders = roots[layout], open_source(roots["folders"], "train", "folders")
    expected = {flat_name(folders.name(i)): (folders.read(i), folders.targets[i]) for i in range(len(folders))}
    assert find_layout(root, "train") == find_layout(root, "val") == layout
    source = open_source(root, "train", layout)
    assert source.classes == folders.classes
    found = {key(layout, source.name(i)): (source.read(i), source.targets[i]) for i in range(len(source))}
    assert found == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_and_a_copy_for_another_process_read_the_same_also_from_threads(roots, layout):
    source = open_source(roots[layout], "train", layout)
    part = pickle.loads(pickle.dumps(source.take([40, 3, 17])))
    assert [part.name(i) for i in range(3)] == [source.name(i) for i in (40, 3, 17)]
    assert part.targets.tolist() == source.targets[[40, 3, 17]].tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(part.read, [0, 1, 2] * 20)) == [source.read(i) for i in (40, 3, 17)] * 20


def test_evaluation_batches_are_bit_for_bit_the_same(roots):
    images = {}
    for layout, root in roots.items():
        data = ImageData(DataSettings(root=str(root), image_size=64, threads=1, eval_batch_size=5))
        source = data.sources["val"]
        pixels = torch.cat([batch.images for batch in data.evaluation_batches(world())])
        images[layout] = {key(layout, source.name(i)): pixels[i] for i in range(len(source))}
    for layout in ("list", "shards"):
        assert images[layout].keys() == images["folders"].keys()
        for name, pixels in images[layout].items():
            assert torch.equal(pixels, images["folders"][name]), name


def train_batches(root, count, *, first_step=0, rank=0, world_size=1, **options):
    plan = BatchPlan.make(images=48, global_batch=16, micro_batch=8, world_size=world_size)
    data = ImageData(DataSettings(root=str(root), image_size=64, threads=1, **options))
    # RandAugment, which takes DALI seconds to build, resumes alike: test_loaders.py
    augment = AugmentSettings(randaugment=None, color_jitter=0.0)
    batches = data.train_batches(plan, augment, 0, world(rank, world_size), first_step)
    return [next(batches) for _ in range(count)]


def test_training_batches_of_folders_and_list_are_bit_for_bit_the_same(roots):
    for ours, theirs in zip(train_batches(roots["folders"], 7), train_batches(roots["list"], 7), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.targets, theirs.targets)


@pytest.mark.parametrize(
    ("layout", "options"),
    [("folders", {}), ("shards", {}), ("shards", dict(shuffle_shards=2)), ("folders", dict(repeats=3))],
    ids=["folders", "shards", "shards in windows", "repeats"],
)
def test_training_resumes_bit_for_bit_and_on_any_number_of_ranks(roots, layout, options):
    straight = train_batches(roots[layout], 8, **options)
    for ours, theirs in zip(straight[6:], train_batches(roots[layout], 2, first_step=3, **options), strict=True):
        assert torch.equal(ours.images, theirs.images)
    by_rank = [train_batches(roots[layout], 4, rank=rank, world_size=2, **options) for rank in range(2)]
    for n in range(8):
        assert torch.equal(straight[n].images, by_rank[n % 2][n // 2].images)
        assert torch.equal(straight[n].targets, by_rank[n % 2][n // 2].targets)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_reads_every_image_once(roots, layout, world_size):
    source = open_source(roots[layout], "train", layout)
    plan = BatchPlan.make(images=48, global_batch=12, micro_batch=12 // world_size, world_size=world_size)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        samplers = [TrainSampler(plan, 1, rank) for rank in range(world_size)]
        read = [source.read(i) for sampler in samplers for step in steps for i in sampler[step].indices]
        assert sorted(read) == sorted(source.read(i) for i in range(48))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_excluded_images_are_left_out_and_unknown_names_reported(roots, layout, tmp_path, caplog):
    source = open_source(roots[layout], "train", layout)
    names = [source.name(i) for i in range(48)]
    exclude = tmp_path / "exclude.txt"
    exclude.write_text(f"# truncated\n{names[5]}\n\n{names[40]}\nnowhere/x.jpg\n")
    data = ImageData(DataSettings(root=str(roots[layout]), exclude=str(exclude)))
    kept = data.sources["train"]
    assert [kept.name(i) for i in range(46)] == [name for i, name in enumerate(names) if i not in (5, 40)]
    assert kept.targets.tolist() == np.delete(source.targets, [5, 40]).tolist()
    assert kept.read(5) == source.read(6)
    with caplog.at_level("INFO", "contextual_cnn"):
        data.log_summary()
    assert tells(caplog.text, "train", "46", "images", "val", "18", "2")
    assert tells(caplog.text, "1", "nowhere/x.jpg")


def test_an_exclude_list_names_images_as_they_are_printed_or_as_the_disk_has_them(image_root, tmp_path):
    root = write_layout("folders", image_root, tmp_path / "root")
    names = [b"caf\xe9.jpg", b"a\nb.jpg", b"\xff.jpg", "ü.jpg".encode()]
    for name in names:
        shutil.copy(root / "train" / "class_0" / "0.JPEG", os.path.join(os.fsencode(root), b"train/class_0", name))
    exclude = tmp_path / "exclude.txt"
    write_exclude_list(exclude, [(r"train/class_0/caf\xe9.jpg", "bad"), (r"train/class_0/a\nb.jpg", "bad")])
    with exclude.open("ab") as file:
        file.write("train/class_0/ü.jpg\n".encode() + b"train/class_0/\xff.jpg\n")
    source = ImageData(DataSettings(root=str(root), exclude=str(exclude))).sources["train"]
    assert [source.name(i) for i in range(48)] == [f"train/class_{i // 8}/{i % 8}.JPEG" for i in range(48)]


def test_only_the_open_splits_names_are_looked_for(roots, tmp_path, caplog):
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("train/class_0/0.JPEG\n")
    with caplog.at_level("INFO", "contextual_cnn"):
        ImageData(DataSettings(root=str(roots["folders"]), exclude=str(exclude)), ("val",)).log_summary()
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_two_layouts_in_one_root_must_be_chosen_from(roots, tmp_path):
    root = write_layout("folders", roots["folders"], tmp_path / "both")
    (root / "train.txt").write_text("train/class_0/0.JPEG 0\ntrain/class_1/0.JPEG 1\n")
    with pytest.raises(UserError, match=r"folders.*list") as error:
        ImageData(DataSettings(root=str(root)))
    assert error.value.fix.startswith("data.layout=folders")
    assert len(ImageData(DataSettings(root=str(root), layout="folders")).sources["train"]) == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shuffle_shards=2), r"data\.shuffle_shards"),
        (dict(layout="list"), r"train\.txt"),
        (dict(layout="shards"), r"data\.root.*train"),
        (dict(repeats=0), r"data\.repeats"),
        (dict(exclude="/nowhere.txt"), r"/nowhere\.txt"),
        (dict(exclude="/etc"), r"/etc\b"),
    ],
)
def test_options_that_do_not_fit_are_refused(image_root, options, message):
    with pytest.raises(UserError, match=message):
        ImageData(DataSettings(root=str(image_root), **options))


def test_evaluation_does_not_mind_how_training_was_shuffled(roots):
    """A checkpoint of a run on shards is evaluated on folders."""
    data = ImageData(DataSettings(root=str(roots["folders"]), shuffle_shards=2), ("val",))
    assert len(data.sources["val"]) == 18

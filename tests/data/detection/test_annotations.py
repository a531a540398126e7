"""COCO's files: ids with gaps, crowds, run lengths, images without objects, and all that may be wrong with them."""

import json
import pickle

import numpy as np
import pytest

from contextual_cnn.data.detection.annotations import ground_truth, open_coco
from contextual_cnn.data.detection.coco_data import CocoData
from contextual_cnn.errors import UserError
from contextual_cnn.settings.coco import CocoSettings
from tests.helpers.scenes import ANNOTATIONS, CATEGORIES, IMAGES, rectangle, write_scenes, write_split


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def assert_same(one, other):
    for (name, array), (same, copy) in zip(sorted(one.arrays().items()), sorted(other.arrays().items()), strict=True):
        assert name == same
        assert np.array_equal(array, copy), name


def test_what_is_annotated_is_found_by_image(root):
    images = open_coco(root, "val")
    assert images.classes == ("cat", "dog", "brush")
    assert images.category_ids.tolist() == [3, 17, 90]
    assert images.targets.tolist() == [11, 18, 25, 32]
    assert [images.name(i) for i in range(4)] == [f"val/picture {n}.png" for n in range(4)]
    assert images.size(0) == (60, 80)
    first = images.objects(0)
    assert first.ids.tolist() == [101, 205]
    assert first.labels.tolist() == [1, 0]
    assert first.boxes.tolist() == [[8, 10, 30, 20], [40, 30, 24, 24]]
    assert images.objects(2).crowd.tolist() == [False, True]
    assert len(images.objects(3).ids) == 0
    everything, usable = images.counts()
    assert everything.tolist() == [2, 1, 2, 0]
    assert usable.tolist() == [2, 1, 1, 0]


def test_a_part_and_a_shared_copy_hold_the_same(root):
    images = open_coco(root, "val")
    part = images.take([2, 0])
    assert part.targets.tolist() == [25, 11]
    assert part.objects(1).ids.tolist() == [101, 205]
    assert part.objects(0).segmentations == images.objects(2).segmentations
    assert_same(images.take(range(4)), images)
    assert_same(pickle.loads(pickle.dumps(images.shared())), images)


def test_the_ground_truth_is_the_file(root):
    truth, problems = ground_truth(open_coco(root, "val"))
    assert not problems
    assert truth["categories"] == CATEGORIES
    for ours, theirs in zip(truth["annotations"], ANNOTATIONS, strict=True):
        for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd"):
            assert ours[key] == theirs[key]


def test_the_year_may_be_in_the_names(tmp_path):
    write_scenes(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split).rename(tmp_path / f"{split}2017")
        file = tmp_path / "annotations" / f"instances_{split}.json"
        file.rename(file.with_name(f"instances_{split}2017.json"))
    assert len(open_coco(tmp_path, "train")) == 4


def test_training_leaves_out_images_without_objects_unless_they_are_wanted(root):
    assert len(CocoData(CocoSettings(root=str(root))).sources["train"]) == 3
    assert len(CocoData(CocoSettings(root=str(root), empty_images=True)).sources["train"]) == 4
    assert len(CocoData(CocoSettings(root=str(root))).sources["val"]) == 4
    assert len(CocoData(CocoSettings(root=str(root), limit=2)).sources["val"]) == 2


FAULTS = {
    "id": ("101", "its id is not a number"),
    "category_id": ([3], "no category has the id [3]"),
    "bbox": ([1, 2, 3], "its bbox"),
    "area": ("large", "its area is not a number"),
    "iscrowd": (2, "its iscrowd"),
    "segmentation": (None, "it has no segmentation"),
}


@pytest.mark.parametrize("key", FAULTS)
def test_a_malformed_annotation_is_a_fault_of_its_image(tmp_path, key):
    value, words = FAULTS[key]
    broken = [rectangle(101, 11, 17, (8, 10, 30, 20)) | {key: value}, *ANNOTATIONS[1:]]
    write_split(tmp_path, "val", broken[1:])
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": broken}))
    images = open_coco(tmp_path, "val")
    assert words in images.fault(0)
    assert images.fault(1) == ""
    assert images.objects(0).ids.tolist() == [205]


@pytest.mark.parametrize("box", [[1e9, 0, 5, 5], [0, 0, -3, 5], [float("inf"), 0, 1, 1], [True, 0, 1, 1]], ids=str)
def test_a_box_is_near_its_image(tmp_path, box):
    write_split(tmp_path, "val", ANNOTATIONS[1:])
    file = tmp_path / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"].append(rectangle(999, 11, 3, (1, 1, 5, 5)) | {"bbox": box})
    file.write_text(json.dumps(content))
    assert "its bbox" in open_coco(tmp_path, "val").fault(0)


FILES = {
    "no JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", "has no list 'images'"),
    "no categories": ({"categories": []}, "has no categories"),
    "a category twice": ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "has no id or name of its own"),
    "no images": ({"images": []}, "lists no images"),
    "an image twice": ({"images": [IMAGES[0], IMAGES[0]]}, "has no id of its own"),
    "an image elsewhere": ({"images": [IMAGES[0] | {"file_name": "../../etc/passwd"}]}, "no file_name below"),
    "an image of no size": ({"images": [IMAGES[0] | {"height": 0}]}, "no height and width"),
    "a huge image": ({"images": [IMAGES[0] | {"height": 10**9}]}, "no height and width"),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_a_malformed_file_is_an_error_that_names_it(tmp_path, content, words):
    write_scenes(tmp_path)
    file = tmp_path / "annotations" / "instances_val.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content)
    with pytest.raises(UserError, match=r"instances_val\.json") as raised:
        open_coco(tmp_path, "val")
    assert words in raised.value.cause


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"instances_train2017\.json"):
        open_coco(tmp_path, "train")
    write_scenes(tmp_path)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no folder"):
        open_coco(tmp_path, "val")
    write_split(tmp_path, "val", annotations=[])
    with pytest.raises(UserError, match="no objects in val"):
        CocoData(CocoSettings(root=str(tmp_path)))


def test_another_list_of_categories_is_refused(root):
    with pytest.raises(UserError, match="'cat' instead of 'bird'"):
        open_coco(root, "val", ("bird", "dog", "brush"))

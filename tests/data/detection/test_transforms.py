"""What is done to an image is done to its boxes and masks alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextual_cnn.data.detection.transforms import COLUMNS, Scene, augmented, cropped, fitted, mirrored, resized
from contextual_cnn.settings.scale_augment import ScaleAugmentSettings

# A mask is resized by nearest pixels, twice: the second resize enlarges the first rounding, 30 pixels to 64 at most
ENLARGED = 64 / 30


def scene(height, width, boxes):
    """The pixels of an object are 255, so that the image tells where it went."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    image = 255 * masks.amax(0) if len(boxes) else torch.zeros(height, width, dtype=torch.uint8)
    return Scene(
        image.expand(3, -1, -1), torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.arange(len(boxes)), masks
    )


def box_of(mask):
    """left, top, right, bottom of what a mask holds."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@st.composite
def scenes(draw):
    height, width = draw(st.integers(40, 90)), draw(st.integers(40, 90))
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        left, top = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
        boxes.append((left, top, draw(st.integers(left + 10, width)), draw(st.integers(top + 10, height))))
    return scene(height, width, boxes)


@settings(deadline=None, max_examples=60)
@given(scenes(), st.lists(st.floats(0, 1, exclude_max=True), min_size=COLUMNS, max_size=COLUMNS), st.booleans())
def test_boxes_stay_the_boxes_of_the_masks(before, uniform, jitter):
    options = {"jitter": [0.5, 1.5], "jitter_size": 64} if jitter else {}
    augment = ScaleAugmentSettings(
        short_sides=[48, 64], longest=120, crop_short_sides=[50, 70], crop_sides=[30, 60], **options
    )
    after = augmented(before, augment, np.array(uniform))
    assert len(after.boxes) == len(after.labels) == len(after.masks) <= len(before.boxes)
    assert after.masks.shape[1:] == after.image.shape[1:]
    assert max(after.size) <= 120
    for box, mask in zip(after.boxes, after.masks, strict=True):
        if mask.any():  # nearest pixels may leave nothing of a sliver
            assert box.tolist() == pytest.approx(box_of(mask), abs=1 + ENLARGED)


def test_a_mirror_image_is_exact():
    before = scene(40, 60, [(5, 10, 20, 30)])
    after = mirrored(before)
    assert after.boxes.tolist() == [[40, 10, 55, 30]]
    assert box_of(after.masks[0]) == [40, 10, 55, 30]
    assert torch.equal(mirrored(after).image, before.image)


def test_a_crop_cuts_boxes_and_drops_what_is_gone():
    before = scene(40, 60, [(0, 0, 10, 10), (20, 5, 50, 35)])
    after = cropped(before, (30, 25), down=0.99, right=0.99)  # rows 10 to 39, columns 35 to 59
    assert after.size == (30, 25)
    assert after.boxes.tolist() == [[0, 0, 15, 25]]
    assert after.labels.tolist() == [1]
    assert box_of(after.masks[0]) == [0, 0, 15, 25]


def test_an_image_without_objects_stays_one():
    after = augmented(scene(40, 60, []), ScaleAugmentSettings(short_sides=[32]), np.full(COLUMNS, 0.3))
    assert after.boxes.shape == (0, 4)
    assert after.masks.shape == (0, *after.size)


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), (800, 1067)), ((640, 427), (1199, 800)), ((300, 1000), (400, 1333))]
)
def test_sizes_are_mmdetections(size, expected):
    """Its imrescale: int(side * scale + 0.5), with the scale that keeps both limits."""
    assert fitted(*size, 800, 1333) == expected


def test_a_resize_scales_the_boxes_with_the_sides():
    after = resized(scene(40, 80, [(8, 10, 20, 30)]), 60, 200)
    assert after.size == (60, 120)
    assert after.boxes.tolist() == [[12, 15, 30, 45]]


def test_the_branches_are_chosen_by_their_shares():
    before = scene(90, 90, [(0, 0, 90, 90)])
    augment = ScaleAugmentSettings(short_sides=[90], crop=0.5, crop_short_sides=[80], crop_sides=[40, 60], hflip=0.25)
    draws = np.random.default_rng(0).random((400, COLUMNS))
    sizes = [augmented(before, augment, uniform).size for uniform in draws]
    whole = sum(size == (90, 90) for size in sizes) / len(sizes)
    assert 0.4 < whole < 0.65  # and those whose crop happened to be a square
    assert all(min(size) == 90 for size in sizes)

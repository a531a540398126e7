"""Crops of clips: sides and places as published, one for all frames."""

import numpy as np
import pytest

from contextual_cnn.data.video.crops import cropped, evaluation_views, training_box
from contextual_cnn.settings.clip import ClipSettings

SCALES = (1.0, 0.875, 0.75, 0.66)


def test_training_crops_have_the_published_sides_and_places():
    """GroupMultiScaleCrop of 340 x 256 pixels for 224, with max_distort=1 and more_fix_crop."""
    sides = [256, 224, 192, 168]
    pairs = {(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1}
    boxes = [
        training_box(256, 340, 224, SCALES, np.array([pair, place]))
        for pair in np.linspace(0, 1, 50, endpoint=False)
        for place in np.linspace(0, 1, 130, endpoint=False)
    ]
    assert {box[2:] for box in boxes} == pairs
    assert len({box[:2] for box in boxes if box[2:] == (192, 192)}) == 13
    for top, left, height, width in boxes:
        assert 0 <= top <= 256 - height
        assert 0 <= left <= 340 - width


def test_a_side_close_to_the_input_becomes_the_input():
    box = training_box(226, 400, 224, (1.0,), np.zeros(2))
    assert box == (0, 0, 224, 224)


def test_all_frames_of_a_clip_have_one_crop_and_one_side():
    frames = np.random.default_rng(0).integers(0, 255, (1, 48, 64, 3), dtype=np.uint8).repeat(5, axis=0)
    small = cropped(frames, (3, 5, 40, 32), 16, flip=False)
    assert small.shape == (5, 16, 16, 3)
    assert (small == small[:1]).all()
    assert (cropped(frames, (3, 5, 40, 32), 16, flip=True) == small[:, :, ::-1]).all()
    assert (cropped(frames, (0, 8, 48, 48), 48, flip=False) == frames[:, :, 8:56]).all()


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (33, 47)])
@pytest.mark.parametrize(("crops", "side"), [(1, 28), (10, 28), (3, 32)])
def test_the_views_of_an_evaluation(height, width, crops, side):
    frames = np.random.default_rng(0).integers(0, 255, (4, height, width, 3), dtype=np.uint8)
    views = evaluation_views(frames, ClipSettings(crops=crops), 28, 32)
    assert views.shape == (crops, 4, side, side, 3)
    if crops == 10:
        assert (views[5:] == views[:5, :, :, ::-1]).all()
        assert (views[4] == evaluation_views(frames, ClipSettings(), 28, 32)[0]).all()
    if crops == 3:
        assert not (views[0] == views[2]).all()

"""Masks are pycocotools' own; what could make it write where it should not is refused before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from contextual_cnn.data.detection.masks import masks_of, run_lengths

HEIGHT, WIDTH = 23, 31


@given(arrays(np.uint8, (HEIGHT, WIDTH), elements=st.integers(0, 1)))
def test_run_lengths_are_read_in_both_forms(mask):
    packed = coco_mask.encode(np.asfortranarray(mask))
    text = {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode("ascii")}
    lengths, value, run = [], 0, 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            lengths.append(run)
            value, run = pixel, 0
        run += 1
    lengths.append(run)
    numbers = {"size": [HEIGHT, WIDTH], "counts": lengths}
    for form in (text, numbers):
        assert np.array_equal(masks_of([form], HEIGHT, WIDTH)[0], mask)
    assert run_lengths(text, HEIGHT, WIDTH)["counts"] == packed["counts"]


def test_polygons_are_pycocotools_own_and_several_make_one_object():
    parts = [[2.5, 3.0, 12.0, 3.0, 12.0, 14.5], [20.0, 5.0, 28.0, 5.0, 28.0, 12.0, 20.0, 12.0]]
    expected = sum(coco_mask.decode(coco_mask.frPyObjects([part], HEIGHT, WIDTH))[..., 0] for part in parts) > 0
    assert np.array_equal(masks_of([parts], HEIGHT, WIDTH)[0], expected)


MALFORMED = {
    "no polygons": [],
    "two corners": [[1, 2, 3, 4]],
    "an odd number": [[1, 2, 3, 4, 5, 6, 7]],
    "a text": [["a", 1, 2, 3, 4, 5]],
    "not finite": [[1, 2, 3, 4, 5, float("nan")]],
    "another size": {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
    "too few pixels": {"size": [HEIGHT, WIDTH], "counts": [5, 6]},
    "too many pixels": {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH + 1]},
    "negative runs": {"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]},
    "no counts": {"size": [HEIGHT, WIDTH]},
    "a number": 5,
    "text that ends early": {"size": [HEIGHT, WIDTH], "counts": "o"},
    "no COCO text": {"size": [HEIGHT, WIDTH], "counts": "\u00ff\u00ff"},
    "a number without end": {"size": [HEIGHT, WIDTH], "counts": "o" * 1000},
    "runs beyond the image": {"size": [HEIGHT, WIDTH], "counts": "ooooo1"},
}


@pytest.mark.parametrize("segmentation", MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_refused(segmentation):
    with pytest.raises(ValueError, match=r"."):
        run_lengths(segmentation, HEIGHT, WIDTH)


def test_a_polygon_may_lie_far_away_and_costs_nothing():
    far = [[-1e12, -1e12, 1e12, -1e12, 1e12, 1e12, -1e12, 1e12]]
    assert masks_of([far], HEIGHT, WIDTH).all()


def test_masks_that_fill_the_memory_are_refused():
    with pytest.raises(ValueError, match="too much"):
        masks_of([[[0, 0, 9, 0, 9, 9]]] * 5000, 10_000, 10_000)


@given(st.text(max_size=60))
def test_any_text_is_a_mask_or_refused(text):
    try:
        packed = run_lengths({"size": [HEIGHT, WIDTH], "counts": text}, HEIGHT, WIDTH)
    except ValueError:
        return
    assert coco_mask.decode(packed).shape == (HEIGHT, WIDTH)

"""The resize of both loaders against Pillow's."""

import numpy as np
import pytest
from PIL import Image

from contextual_cnn.data.resize import BatchResize, resize


def by_pillow(image, height, width, interpolation):
    """Rows, then columns, as ever; Pillow 13 begins with the columns of a tall image."""
    kind = Image.Resampling[interpolation.upper()]
    rows = Image.fromarray(image).resize((width, image.shape[0]), kind)
    return np.array(rows.resize((width, height), kind))


LARGER = [((60, 90), (224, 224)), ((3, 200), (224, 224)), ((1, 1), (32, 32))]
SMALLER = [((375, 500), (224, 224)), ((390, 230), (224, 224)), ((427, 640), (256, 383)), ((427, 640), (32, 32))]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("of", "to"), [*LARGER, *SMALLER, ((224, 224), (224, 224))])
def test_pixels_are_pillows_but_for_roundings(photos, of, to, interpolation):
    noise = np.random.default_rng(0).integers(0, 256, (*of, 3), dtype=np.uint8)
    for image in (photos[0][: of[0], : of[1]], noise):  # the first one is not contiguous
        difference = np.abs(resize(image, *to, interpolation).astype(int) - by_pillow(image, *to, interpolation))
        assert difference.max() <= 2
        assert difference.mean() < 0.01


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_resized_in_its_order(photos, threads):
    images = [photos[i % 2][i : 40 + 3 * i, : 60 + i] for i in range(21)]
    sizes = [np.array([30 + i, 50], np.int32) for i in range(21)]
    flat = BatchResize(threads, "bilinear")(images, sizes)
    for image, size, ours in zip(images, sizes, flat, strict=True):
        assert (ours == resize(image, *size.tolist(), "bilinear").ravel()).all()

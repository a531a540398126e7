"""Masks of objects from COCO's annotations, by pycocotools, which is shown nothing that could harm it.

An annotation is somebody's input. pycocotools counts in C: it takes memory by how far apart a polygon's corners are,
and writes runs where they say.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from contextual_cnn.errors import UserError

_MOST_BYTES = 2**32  # of an image's masks
_MOST_CORNERS = 2**17  # of an annotation


def import_mask() -> Any:
    """pycocotools.mask.

    Raises:
        UserError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(
            "COCO's masks are read by pycocotools, which is not installed", "pip install pycocotools"
        ) from (error)
    return mask


def run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A segmentation as COCO's compressed run lengths.

    Args:
        segmentation: a list of polygons (x, y, x, y, ... in pixels), or run lengths, compressed or not.

    Raises:
        ValueError: it is neither, or does not fit the image.
    """
    mask = import_mask()
    if isinstance(segmentation, list):
        polygons = [_checked_polygon(polygon, height, width) for polygon in segmentation]
        if not polygons or sum(map(len, polygons)) > 2 * _MOST_CORNERS:
            raise ValueError("no polygon, or too many corners")
        return mask.merge(mask.frPyObjects(polygons, height, width))
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        raise ValueError(f"neither polygons nor run lengths of {height} x {width} pixels")
    counts = segmentation.get("counts")
    counts = _uncompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("its run lengths are not numbers")
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths make up {sum(counts)} pixels of {height * width}")
    return mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def masks_of(segmentations: Sequence[Any], height: int, width: int) -> np.ndarray:
    """(n, H, W) uint8 of 0 and 1. Raises ValueError, as `run_lengths`, and for more than there is room for."""
    if len(segmentations) * height * width > _MOST_BYTES:
        raise ValueError(f"{len(segmentations)} masks of {width} x {height} pixels are too much")
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    for i, segmentation in enumerate(segmentations):
        masks[i] = import_mask().decode(run_lengths(segmentation, height, width))
    return masks


def _checked_polygon(polygon: Any, height: int, width: int) -> list[float]:
    """With its corners brought to at most the image's size away from it."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon is x, y of three corners or more")
    if not all(type(value) in (int, float) for value in polygon):
        raise ValueError("the corners of a polygon are numbers")
    corners = np.array(polygon, dtype=np.float64)
    if not np.isfinite(corners).all():
        raise ValueError("the corners of a polygon are finite numbers")
    corners = corners.reshape(-1, 2).clip((-width, -height), (2 * width, 2 * height))
    return corners.reshape(-1).tolist()


def _uncompressed(text: str) -> list[int]:
    """Run lengths from COCO's text: base 32 in characters from "0" on, each count from the third on as a difference."""
    counts: list[int] = []
    for value in _numbers(text):
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts


def _numbers(text: str) -> Iterator[int]:
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("its run lengths are no COCO text")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            yield value - (1 << shift) if bits & 16 else value
            value = shift = 0
    if shift:
        raise ValueError("its run lengths end in the middle")

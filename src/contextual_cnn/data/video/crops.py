"""Where clips are cropped: TSM's multi-scale crops for training, and the crops of an evaluation.

All frames of a clip have one crop. Boxes are (top, left, height, width) in pixels.
"""

from collections.abc import Sequence

import numpy as np

from contextual_cnn.data.resize import resize
from contextual_cnn.settings.clip import ClipSettings

Box = tuple[int, int, int, int]

_MOST_DISTORTION = 1  # steps between the scales of height and width
_SNAP = 3  # pixels: a side this close to the model's input is made equal to it
# Row and column of a crop within the room that it has, in quarters: corners, centre, edges, and between them
_PLACES = ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3))


def training_box(height: int, width: int, size: int, scales: Sequence[float], uniform: np.ndarray) -> Box:
    """A crop whose sides are two of the scales, at most one step apart, of the frame's shorter side.

    Args:
        size: of the model's input.
        uniform: (2,) numbers in [0, 1): which sides, and which of 13 places.
    """
    base = min(height, width)
    sides = [size if abs(int(base * scale) - size) < _SNAP else int(base * scale) for scale in scales]
    pairs = [
        (min(high, height), min(wide, width))
        for i, high in enumerate(sides)
        for j, wide in enumerate(sides)
        if abs(i - j) <= _MOST_DISTORTION
    ]
    high, wide = pairs[int(uniform[0] * len(pairs))]
    row, column = _PLACES[int(uniform[1] * len(_PLACES))]
    return row * ((height - high) // 4), column * ((width - wide) // 4), high, wide


def cropped(frames: np.ndarray, box: Box, size: int, flip: bool) -> np.ndarray:
    """(T, H, W, 3) uint8 -> (T, size, size, 3), bilinear."""
    top, left, height, width = box
    frames = frames[:, top : top + height, left : left + width, :]
    frames = np.stack([resize(frame, size, size, "bilinear") for frame in frames])
    return frames[:, :, ::-1] if flip else frames


def evaluation_views(frames: np.ndarray, clip: ClipSettings, size: int, short_side: int) -> np.ndarray:
    """The crops of a clip whose shorter side is resized first.

    1: the centre. 10: corners and centre, and their mirror images. 3: at full resolution, squares of the shorter side
    at both ends of the longer one and in the middle.

    Args:
        frames: (T, H, W, 3) uint8.

    Returns:
        (crops, T, S, S, 3) uint8; S is size, or the shorter side of three crops.
    """
    height, width = frames.shape[1:3]
    scale = short_side / min(height, width)
    height, width = (max(short_side, round(side * scale)) for side in (height, width))
    frames = np.stack([resize(frame, height, width, "bilinear") for frame in frames])
    side = short_side if clip.crops == 3 else size
    down, right = height - side, width - side
    middle = (round(down / 2), round(right / 2))
    corners = {
        1: [middle],
        3: [(0, 0), middle, (down, right)],
        10: [(0, 0), (0, right), (down, 0), (down, right), middle],
    }[clip.crops]
    views = np.stack([frames[:, top : top + side, left : left + side] for top, left in corners])
    return np.concatenate([views, views[:, :, :, ::-1]]) if clip.crops == 10 else views

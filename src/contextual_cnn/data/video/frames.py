"""Which frames of a video make a clip: arithmetic alone, as the temporal shift module's code has it.

Shapes: T frames of a clip, C clips of a video. A video has `count` frames, numbered from 0.
"""

import numpy as np

from contextual_cnn.settings.clip import ClipSettings


def training_frames(count: int, clip: ClipSettings, uniform: np.ndarray) -> np.ndarray:
    """The frames of a training clip.

    "uniform": a random frame of each of T equal parts. "dense": every stride-th frame from a random one on, from the
    beginning again where the video ends. A video of fewer than T frames shows some of them twice, in their order.
    (The original repeats its first frame T times, and so loses all motion.)

    Args:
        uniform: (T,) numbers in [0, 1).

    Returns:
        (T,) int64.
    """
    places = np.arange(clip.frames)
    if clip.sampling == "dense":
        start = int(uniform[0] * max(1, _starts(count, clip) - 1))
        return (start + places * clip.stride) % count
    part = count // clip.frames
    if part == 0:
        return places * count // clip.frames
    return places * part + (uniform * part).astype(np.int64)


def evaluation_frames(count: int, clip: ClipSettings) -> np.ndarray:
    """The frames of the clips that an evaluation takes of a video, spread evenly over it.

    "uniform": of each of T equal parts the middle one, or of several clips each another. "dense": as in training, from
    starts that are spread from the first to the last.

    Returns:
        (C, T) int64.
    """
    places, clips = np.arange(clip.frames), np.arange(clip.clips)[:, None]
    if clip.sampling == "dense":
        starts = np.linspace(0, _starts(count, clip) - 1, clip.clips, dtype=np.int64)[:, None]
        return (starts + places * clip.stride) % count
    part = count / clip.frames
    return (part * (places + (clips + 0.5) / clip.clips)).astype(np.int64)


def _starts(count: int, clip: ClipSettings) -> int:
    """How many frames a dense clip may start from."""
    return max(1, 1 + count - clip.frames * clip.stride)

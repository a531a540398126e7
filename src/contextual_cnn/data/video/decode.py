"""Chosen frames of an encoded video, by PyAV."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from contextual_cnn.errors import UserError

_LARGEST_SIDE = 8192
_LARGEST_CLIP = 2**31  # bytes of the frames that are kept


class UnusableVideo(Exception):
    """Why a video cannot be used, in a few words."""


def read_frames(encoded: bytes, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """The frames that are asked for, in any order and as often as wanted.

    Of a codec whose frames stand alone (MJPEG) only those are decoded; of others all up to the last one.

    Args:
        encoded: a whole file.
        choose: from the number of frames, which is counted and not taken from the header, to (..., T) int64.

    Returns:
        (..., T, H, W, 3) uint8, RGB, upright.

    Raises:
        UnusableVideo: no video, damaged, or too large.
        UserError: PyAV is not installed.
    """
    av = _import_av()
    try:
        with av.open(io.BytesIO(encoded)) as container:
            if not container.streams.video:
                raise UnusableVideo("no pictures in it")
            stream = container.streams.video[0]
            _check_size(stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.thread_count = 1  # a worker process for each core is faster than threads
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            if not packets:
                raise UnusableVideo("no frames in it")
            chosen = choose(len(packets))
            wanted = np.unique(chosen)
            found = _alone(packets, wanted) if stream.codec.intra_only else _in_turn(stream, packets, wanted)
            pictures = np.stack([_upright(found[number]) for number in wanted])
    except (UnusableVideo, UserError):
        raise
    except Exception as error:  # FFmpeg's errors have no common class that says more
        raise UnusableVideo(f"{type(error).__name__}: {error}"[:200]) from error
    return pictures[np.searchsorted(wanted, chosen)]


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError("videos are decoded by PyAV, which is not installed", "pip install av") from error
    av.logging.set_level(None)  # what FFmpeg says of a damaged file is not said for each of its packets
    return av


def _check_size(width: int, height: int) -> None:
    if not (0 < width <= _LARGEST_SIDE and 0 < height <= _LARGEST_SIDE):
        raise UnusableVideo(f"frames of {width} x {height} pixels")


def _alone(packets: list[Any], wanted: np.ndarray) -> dict[int, Any]:
    found = {}
    for number in wanted.tolist():
        frames = packets[number].decode()
        if not frames:
            raise UnusableVideo(f"frame {number} does not decode")
        found[number] = frames[0]
    return _checked(found)


def _in_turn(stream: Any, packets: list[Any], wanted: np.ndarray) -> dict[int, Any]:
    """Frames come out of the decoder in the order in which they are shown."""
    found, last = {}, int(wanted[-1])
    numbers = set(wanted.tolist())
    for number, frame in enumerate(_decoded(stream, packets)):
        if number in numbers:
            found[number] = frame
        if number == last:
            return _checked(found)
    raise UnusableVideo(f"of {len(packets)} frames not all decode")


def _decoded(stream: Any, packets: list[Any]) -> Iterator[Any]:
    for packet in packets:
        yield from packet.decode()
    yield from stream.codec_context.decode(None)  # what it still holds


def _checked(found: dict[int, Any]) -> dict[int, Any]:
    """A stream may change its size, and a damaged frame may claim any."""
    sizes = {(frame.width, frame.height) for frame in found.values()}
    for width, height in sizes:
        _check_size(width, height)
    if len(sizes) > 1:
        raise UnusableVideo(f"frames of {len(sizes)} sizes")
    if sum(3 * frame.width * frame.height for frame in found.values()) > _LARGEST_CLIP:
        raise UnusableVideo("its frames need more than 2 GiB")
    return found


def _upright(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8, turned as the file asks for it: phones turn nothing themselves."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # degrees, counterclockwise
    return np.rot90(pixels, turns) if turns else pixels

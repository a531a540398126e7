"""Chosen frames of an encoded video, by PyAV."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from contextual_cnn.errors import UserError

_LARGEST_SIDE = 8192
_LARGEST_CLIP = 2**31  # bytes of the frames that are kept
# Containers of videos. FFmpeg knows playlists and scripts too, which name other files and addresses to be read
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,ogg,flv,asf,mpegts"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}


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
    with _opened(encoded) as (stream, packets):
        chosen = choose(len(packets))
        wanted = np.unique(chosen)
        found = _alone(packets, wanted) if stream.codec.intra_only else _in_turn(stream, packets, wanted)
        pictures = np.stack([_upright(found[number]) for number in wanted])
    return pictures[np.searchsorted(wanted, chosen)]


def every_frame(encoded: bytes) -> Iterator[np.ndarray]:
    """All frames in the order in which they are shown, each (H, W, 3) uint8, RGB, upright.

    Raises:
        UnusableVideo, UserError: as `read_frames`, also in the middle.
    """
    with _opened(encoded) as (stream, packets):
        for frame in _decoded(stream, packets):
            _keep({}, 0, frame, 1)
            yield _upright(frame)


@contextmanager
def _opened(encoded: bytes) -> Iterator[tuple[Any, list[Any]]]:
    """The stream of pictures, and its packets. Whatever goes wrong within is an UnusableVideo."""
    av = import_av()
    try:
        with av.open(io.BytesIO(encoded), options=_OPTIONS) as container:
            if not container.streams.video:
                raise UnusableVideo("no pictures in it")
            stream = container.streams.video[0]
            stream.codec_context.options = {"max_pixels": str(_LARGEST_SIDE**2)}  # of frames that are not kept, too
            stream.codec_context.thread_count = 1  # a worker process for each core is faster than threads
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            if not packets:
                raise UnusableVideo("no frames in it")
            yield stream, packets
    except (UnusableVideo, UserError, GeneratorExit):
        raise
    except Exception as error:  # FFmpeg's errors have no common class that says more
        raise UnusableVideo(f"{type(error).__name__}: {error}"[:200]) from error


def import_av() -> Any:
    """PyAV.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("videos are decoded by PyAV, which is not installed", "pip install av") from error
    av.logging.set_level(None)  # what FFmpeg says of a damaged file is not said for each of its packets
    return av


def _alone(packets: list[Any], wanted: np.ndarray) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for number in wanted.tolist():
        frames = packets[number].decode()
        if not frames:
            raise UnusableVideo(f"frame {number} does not decode")
        _keep(found, number, frames[0], len(wanted))
    return found


def _in_turn(stream: Any, packets: list[Any], wanted: np.ndarray) -> dict[int, Any]:
    """Frames come out of the decoder in the order in which they are shown."""
    found: dict[int, Any] = {}
    numbers, last = set(wanted.tolist()), int(wanted[-1])
    for number, frame in enumerate(_decoded(stream, packets)):
        if number in numbers:
            _keep(found, number, frame, len(wanted))
        if number == last:
            return found
    raise UnusableVideo(f"of {len(packets)} frames not all decode")


def _decoded(stream: Any, packets: list[Any]) -> Iterator[Any]:
    for packet in packets:
        yield from packet.decode()
    yield from stream.codec_context.decode(None)  # what it still holds


def _keep(found: dict[int, Any], number: int, frame: Any, frames: int) -> None:
    """A stream may change its size, and a damaged frame may claim any: the first one that is too large ends it.

    Args:
        frames: that will be kept.
    """
    width, height = frame.width, frame.height
    if max(width, height) > _LARGEST_SIDE or 3 * width * height * frames > _LARGEST_CLIP:
        raise UnusableVideo(f"{frames} frames of {width} x {height} pixels are too much")
    first = next(iter(found.values()), frame)
    if (first.width, first.height) != (width, height):
        raise UnusableVideo(f"frames of {first.width} x {first.height} and of {width} x {height} pixels")
    found[number] = frame


def _upright(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8, turned as the file asks for it: phones turn nothing themselves."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # degrees, counterclockwise
    return np.rot90(pixels, turns) if turns else pixels

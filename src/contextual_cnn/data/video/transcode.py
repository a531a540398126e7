"""Videos of any kind, written once as the kind that a training reads fast: small frames that stand alone (MJPEG)."""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from contextual_cnn.data.resize import resize
from contextual_cnn.data.video.decode import UnusableVideo, every_frame, import_av

_RATE = 25  # frames a second: what a player shows. Which frames a clip has goes by their numbers


def transcode(encoded: bytes, output: Path, short_side: int, quality: int) -> int:
    """Writes every frame as a JPEG of its own, without sound, into a .mov file.

    Pillow makes the JPEGs: FFmpeg's encoder would give more bytes to a beginning than to an end.

    Args:
        encoded: a whole file.
        short_side: pixels to which the shorter side shrinks; smaller videos stay as they are.
        quality: of the JPEGs.

    Returns:
        How many frames there are.

    Raises:
        UnusableVideo: damaged, or with frames of several sizes.
        UserError: PyAV is not installed.
    """
    av = import_av()
    with av.open(output, "w", format="mov") as container:
        stream, count = container.add_stream("mjpeg", rate=_RATE), 0
        stream.pix_fmt, stream.time_base = "yuvj420p", Fraction(1, _RATE)
        for count, pixels in enumerate(_shrunk(encoded, short_side), start=1):
            if count == 1:
                stream.height, stream.width = pixels.shape[:2]
            elif (stream.height, stream.width) != pixels.shape[:2]:
                raise UnusableVideo("frames of several sizes")
            packet = av.Packet(_jpeg(pixels, quality))
            packet.pts = packet.dts = count - 1
            packet.stream, packet.time_base, packet.is_keyframe = stream, stream.time_base, True
            container.mux(packet)
        if not count:
            raise UnusableVideo("no frames decode")
    return count


def _shrunk(encoded: bytes, short_side: int) -> Iterator[np.ndarray]:
    for pixels in every_frame(encoded):
        height, width = pixels.shape[:2]
        scale = short_side / min(height, width)
        height, width = (max(short_side, round(side * scale)) for side in (height, width))
        yield resize(pixels, height, width, "bilinear") if scale < 1 else pixels


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()

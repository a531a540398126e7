"""Kinds of images as they lie in real folders: what decodes although it is odd, and what does not."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(photo, format="JPEG", mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo[200:300, 200:350]).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def wide_png(photo, channels: int) -> bytes:
    """16 bits a channel; PIL writes none with colors."""
    rows = (photo[200:300, 200:350, :channels].astype(">u2") * 257).reshape(100, -1)
    header = struct.pack(">IIBBBBB", 150, 100, 16, 2 if channels == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def with_exif(photo) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo, exif=exif)


def broken_exif(photo) -> bytes:
    data = with_exif(photo)
    at = data.index(b"Exif\0\0") + 6
    return data[:at] + b"\xff" * 12 + data[at + 12 :]


def blank(format, mode, width, height) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 100).save(buffer, format)
    return buffer.getvalue()


def resized(jpeg, width=None, height=None, precision=8) -> bytes:
    """A JPEG whose header claims another size, or other samples."""
    data = bytearray(jpeg)
    frame = data.index(b"\xff\xc0")
    data[frame + 4] = precision
    for at, value in ((5, height), (7, width)):
        if value is not None:
            data[frame + at : frame + at + 2] = value.to_bytes(2, "big")
    return bytes(data)


def changed(data, flips=0, zeroed=0) -> bytes:
    """Bits flipped, or bytes zeroed, in the middle of the data."""
    data, rng = bytearray(data), np.random.default_rng(0)
    middle = len(data) // 2
    data[middle : middle + zeroed] = bytes(zeroed)
    for at in rng.integers(middle, len(data) - 10, flips):
        data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)


DECODED = {
    "cmyk": lambda p: encoded(p, mode="CMYK"),
    "grey": lambda p: encoded(p, mode="L"),
    "progressive": lambda p: encoded(p, progressive=True),
    "png": lambda p: encoded(p, "PNG"),
    "png with alpha": lambda p: encoded(p, "PNG", "RGBA"),
    "png with palette": lambda p: encoded(p, "PNG", "P"),
    "16 bit grey png": lambda p: wide_png(p, 1),
    "16 bit png": lambda p: wide_png(p, 3),
    "bmp": lambda p: encoded(p, "BMP"),
    "webp": lambda p: encoded(p, "WEBP"),
    "tiff": lambda p: encoded(p, "TIFF"),
    "one pixel": lambda _: blank("JPEG", "L", 1, 1),
    "a column": lambda _: blank("JPEG", "RGB", 1, 5000),
    "two rows": lambda _: blank("JPEG", "RGB", 5000, 2),
    "large": lambda _: blank("JPEG", "L", 4000, 4000),
    "turned by exif": with_exif,
    "broken exif": broken_exif,
    "rubbish behind": lambda p: encoded(p) + b"x" * 1000,
    "zeroed middle": lambda p: changed(encoded(p), zeroed=100),
    "flipped bits": lambda p: changed(encoded(p), flips=40),
}
BAD = {
    "empty": lambda _: b"",
    "one byte": lambda _: b"\xff",
    "header only": lambda p: encoded(p)[:20],
    "a tenth": lambda p: encoded(p)[: len(encoded(p)) // 10],
    "half": lambda p: encoded(p)[: len(encoded(p)) // 2],
    "100 bytes missing": lambda p: encoded(p)[:-100],
    "2 bytes missing": lambda p: encoded(p)[:-2],
    "html": lambda _: b"<html>404 not found</html>" * 50,
    "noise": lambda _: np.random.default_rng(0).bytes(5000),
    "half a png": lambda p: encoded(p, "PNG")[:3000],
    "gif": lambda p: encoded(p, "GIF", "P"),
    "no width": lambda p: resized(encoded(p), width=0),
    "12 bits": lambda p: resized(encoded(p), precision=12),
    "bomb": lambda p: resized(encoded(p), 30_000, 30_000),
}

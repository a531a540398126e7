"""The verdict on damaged and unusual images, and whether the pipeline's decoder is of the same opinion."""

import io

import numpy as np
import pytest
from PIL import Image

from contextual_cnn.data.image_check import image_kinds


def encoded(photo, format="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(photo[:100, :150]).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def wide(photo):
    """16 bits a channel."""
    buffer = io.BytesIO()
    Image.fromarray(photo[:100, :150, 0].astype(np.uint16) * 257).save(buffer, "PNG")
    return buffer.getvalue()


def turned(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo, exif=exif)


def blank(format, mode, side):
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, format)
    return buffer.getvalue()


FINE = {
    "jpeg": (encoded, "a.JPEG", ["JPEG"]),
    "progressive": (lambda p: encoded(p, progressive=True), "a.jpg", ["JPEG"]),
    "grey": (lambda p: encoded(p, mode="L"), "a.jpg", ["JPEG", "grey"]),
    "cmyk": (lambda p: encoded(p, mode="CMYK"), "a.jpg", ["JPEG", "CMYK"]),
    "turned": (turned, "a.jpg", ["JPEG", "turned by EXIF"]),
    "rubbish behind": (lambda p: encoded(p) + b"x" * 1000, "a.jpg", ["JPEG"]),
    "png": (lambda p: encoded(p, "PNG"), "a.png", ["PNG"]),
    "png as jpeg": (lambda p: encoded(p, "PNG"), "a.JPEG", ["PNG", "PNG by another name"]),
    "alpha": (lambda p: encoded(p, "PNG", "RGBA"), "a.png", ["PNG", "alpha or palette"]),
    "palette": (lambda p: encoded(p, "PNG", "P"), "a.png", ["PNG", "alpha or palette"]),
    "16 bits": (wide, "a.png", ["PNG", "grey", "16 bits"]),
    "webp": (lambda p: encoded(p, "WEBP"), "a.webp", ["WEBP"]),
    "bmp": (lambda p: encoded(p, "BMP"), "a.bmp", ["BMP"]),
    "tiff": (lambda p: encoded(p, "TIFF"), "a.tiff", ["TIFF"]),
    "huge": (lambda _: blank("JPEG", "L", 8000), "a.jpg", ["JPEG", "grey", "huge"]),
}


BAD = {
    "one byte": lambda p: b"\xff",
    "header only": lambda p: encoded(p)[:20],
    "a tenth": lambda p: encoded(p)[: len(encoded(p)) // 10],
    "no end": lambda p: encoded(p)[:-2],
    "half": lambda p: encoded(p)[: len(encoded(p)) // 2],
    "text": lambda p: b"<html>404 not found</html>" * 50,
    "noise": lambda p: np.random.default_rng(0).bytes(5000),
    "half a png": lambda p: encoded(p, "PNG")[:3000],
    "gif": lambda p: encoded(p, "GIF", "P"),
    "no width": lambda p: resized(encoded(p), 0),
}


def resized(jpeg, width):
    """A JPEG whose header claims another width."""
    data = bytearray(jpeg)
    frame = data.index(b"\xff\xc0")
    data[frame + 7 : frame + 9] = width.to_bytes(2, "big")
    return bytes(data)


def dali_decodes(data):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
        image = fn.external_source(lambda: [np.frombuffer(data, np.uint8)], dtype=types.UINT8, ndim=1)
        return fn.decoders.image(image, output_type=types.RGB, adjust_orientation=False)

    built = pipeline()
    try:
        built.build()
        built.run()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("case", FINE)
def test_unusual_images_are_named_by_kind_and_decoded_by_the_pipeline(photos, case):
    make, name, kinds = FINE[case]
    data = make(photos[0])
    assert image_kinds(data, name) == kinds
    assert dali_decodes(data)


@pytest.mark.parametrize("case", BAD)
def test_what_the_pipeline_cannot_decode_is_bad(photos, case):
    data = BAD[case](photos[0])
    with pytest.raises(Exception, match=r"."):
        image_kinds(data, "a.jpg")
    assert not dali_decodes(data)


def test_bombs_and_empty_files_are_bad():
    """A decompression bomb is refused by its header, before it takes gigabytes."""
    with pytest.raises(Image.DecompressionBombError):
        image_kinds(blank("PNG", "1", 30_000), "a.png")
    with pytest.raises(OSError, match="empty"):
        image_kinds(b"", "a.jpg")


def test_an_animation_is_named(photos):
    frames = [Image.fromarray(photo[:50, :50]) for photo in photos]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    assert image_kinds(buffer.getvalue(), "a.webp") == ["WEBP", "animated"]

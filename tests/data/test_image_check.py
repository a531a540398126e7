"""The verdict on damaged and unusual images, and whether the pipeline's decoder is of the same opinion."""

import ast
import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from contextual_cnn.analysis.images import ImageMaker
from contextual_cnn.data import torch_loader
from contextual_cnn.data.bad_images import BadImage
from contextual_cnn.data.image_check import check_header, image_kinds, open_image
from contextual_cnn.data.imagenet_archives import ArchivedImage
from contextual_cnn.data.sources import open_source
from contextual_cnn.errors import UserError
from contextual_cnn.settings.data import DataSettings
from scripts.data import prepare_imagenet
from tests.conftest import ROOT


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


def text_bomb(photo):
    """A PNG with a comment of 100 MB in 100 kB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 100_000_000, zip=True)
    return encoded(photo, "PNG", pnginfo=info)


OTHER_FORMATS = {
    "svg": lambda p: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "pdf": lambda p: encoded(p, "PDF"),
    "ico": lambda p: encoded(p, "ICO"),
    "avif": lambda p: encoded(p, "AVIF"),
    "tga": lambda p: encoded(p, "TGA"),
    "text bomb": text_bomb,
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


@pytest.mark.parametrize("case", OTHER_FORMATS)
def test_other_formats_are_bad_whatever_they_are_called(photos, case):
    with pytest.raises(Exception, match=r"."):
        image_kinds(OTHER_FORMATS[case](photos[0]), "a.jpg")


@pytest.mark.parametrize("behind", [b"PK\3\4" + b"x" * 500 + b"PK\5\6" + b"\0" * 18, b"<script>alert(1)</script>"])
def test_a_jpeg_that_is_something_else_too_is_decoded_as_a_jpeg(photos, behind):
    data = encoded(photos[0])
    with open_image(data) as alone, open_image(data + behind) as both:
        assert both.format == "JPEG"
        assert np.array_equal(np.asarray(alone), np.asarray(both))


def test_bombs_and_empty_files_are_bad():
    """A decompression bomb is refused by its header, before it takes gigabytes."""
    bomb = bytearray(blank("PNG", "1", 30))
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    with pytest.raises(Image.DecompressionBombError):
        image_kinds(bytes(bomb), "a.png")
    with pytest.raises(OSError, match="empty"):
        image_kinds(b"", "a.jpg")


def test_an_animation_is_named(photos):
    frames = [Image.fromarray(photo[:50, :50]) for photo in photos]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    assert image_kinds(buffer.getvalue(), "a.webp") == ["WEBP", "animated"]


def preview(folder, monkeypatch):
    from scripts.data import preview_data

    monkeypatch.setattr(sys, "argv", ["preview_data.py", str(folder), "--output", str(folder / "x.png")])
    preview_data.main()


OPENED_BY = {
    "check": lambda folder, _: image_kinds((folder / "train/a/0.jpg").read_bytes(), "0.jpg"),
    "torch loader": lambda folder, _: torch_loader._decode(open_source(folder, "train", "folders"), 0),
    "figures": lambda folder, _: ImageMaker(DataSettings(root="", image_size=32), torch.device("cpu")).from_files(
        [folder / "train/a/0.jpg"], ["a"]
    ),
    "preview": preview,
    "preparation": lambda folder, _: prepare_imagenet.encode(
        ArchivedImage("0.jpg", folder / "train/a/0.jpg", 0, (folder / "train/a/0.jpg").stat().st_size, 0), 8, 90
    ),
}


@pytest.mark.parametrize("who", OPENED_BY)
def test_no_image_starts_another_program(tmp_path, postscript, monkeypatch, who):
    """PostScript under the name of a JPEG, for which PIL alone starts Ghostscript. Also predict.py: test_predict.py."""
    picture, note = postscript
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(2):
        (tmp_path / "train" / "a" / f"{i}.jpg").write_bytes(picture)
    with pytest.raises((UserError, BadImage, OSError)):
        OPENED_BY[who](tmp_path, monkeypatch)
    assert not note.exists()


def test_pil_alone_would_start_it(postscript):
    picture, note = postscript
    with pytest.raises(OSError, match=r"."), Image.open(io.BytesIO(picture)) as image:  # it makes no picture
        image.load()
    assert note.exists()


def test_images_are_opened_in_one_place():
    """The supplement of the two tests above: nobody else asks PIL to open anything."""
    found = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value).endswith("Image"):
                found.add(path.name)
    assert found == {"image_check.py"}


def test_a_header_without_end_is_refused_and_long_ones_pass(photos):
    """Millions of markers would be walked over one by one, with Python locked."""
    image = encoded(photos[0])
    comment = b"\xff\xfe\0\3x"
    for long in (b"\xff" * 10_000_000, b"\xff\xe0\0\2" * 3_000_000, b"\xff\xe0\0\2" * 70_000 + image[2:]):
        with pytest.raises(OSError, match="header"):
            check_header(image[:2] + long)
    check_header(image[:2] + comment * 1000 + b"\xff" * 5000 + image[2:])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_torch_loader_decodes_pils_pixels_by_nothing_deprecated(tmp_path, photos, mode):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(encoded(photos[0], mode=mode))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = torch_loader._decode(open_source(tmp_path, "train", "folders"), 0)
    with Image.open(tmp_path / "train" / "a" / "0.jpg") as image:
        assert np.array_equal(decoded, np.asarray(image.convert("RGB")))

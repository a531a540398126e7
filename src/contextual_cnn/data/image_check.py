"""Whether an encoded image decodes, strictly, and what is unusual about it."""

import hashlib
import io
import struct
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from PIL import Image, ImageFile

from contextual_cnn.data.sources import ImageSource
from contextual_cnn.errors import UserError
from contextual_cnn.text import printable

Image.init()  # all of PIL now: threads that import while a process forks leave locks behind that nobody opens

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")  # what the pipeline decodes; GIF it does not
_EXTENSIONS = {"JPEG": (".jpeg", ".jpg"), "TIFF": (".tif", ".tiff"), "PPM": (".ppm",)}
_ORIENTATION = 0x0112
_START_OF_SCAN, _START_OF_FRAME = 0xDA, set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MOST_MARKERS = 65_536  # before an image's data, fill bytes included; cameras write some dozens
_HUGE = 50_000_000  # pixels; above twice PIL's limit (179 million) an image counts as a decompression bomb


@dataclass
class ImageReport:
    """What was found in some images.

    bad: (name, reason) of those that cannot be read or decoded. kinds: how many of each kind. unusual: (name, kind)
    of every kind but plain JPEG. digests: (hash of the bytes, name), where asked for.
    """

    bad: list[tuple[str, str]] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)
    unusual: list[tuple[str, str]] = field(default_factory=list)
    digests: list[tuple[bytes, str]] = field(default_factory=list)

    @classmethod
    def merge(cls, reports: Iterable["ImageReport"]) -> "ImageReport":
        whole = cls()
        for report in reports:
            whole.bad += report.bad
            whole.kinds += report.kinds
            whole.unusual += report.unusual
            whole.digests += report.digests
        return whole


def check_images(with_digests: bool, source: ImageSource) -> ImageReport:
    """Reads and decodes every image of a source; one that fails is reported, and the others are still looked at."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whatever an imported library thinks of it
    report = ImageReport()
    for index in range(len(source)):
        name = source.name(index)
        try:
            encoded = source.read(index)
            kinds = image_kinds(encoded, name)
        except Exception as error:  # a decoder raises anything from OSError to struct.error
            report.bad.append((name, reason_of(error)))
            continue
        report.kinds.update(kinds)
        report.unusual += [(name, kind) for kind in kinds if kind != "JPEG"]
        if with_digests:
            report.digests.append((hashlib.blake2b(encoded, digest_size=16).digest(), name))
    return report


def image_kinds(encoded: bytes, name: str) -> list[str]:
    """Format and peculiarities of an image that decodes to its last pixel; one that does not raises some error."""
    check_header(encoded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF and sizes; what matters of it is reported
        with open_image(encoded) as image:
            image.load()
            assert image.format is not None  # the decoder's name; only images made in memory have none
            kind = "JPEG" if image.format == "MPO" else image.format  # a JPEG with a second picture behind it
            peculiarities = {
                "CMYK": image.mode == "CMYK",
                "grey": image.mode in ("1", "L", "LA", "I", "F", "I;16", "I;16B"),
                "alpha or palette": image.mode in ("LA", "RGBA", "P", "PA"),
                "16 bits": image.mode.startswith("I;16") or (kind == "PNG" and encoded[24] == 16),
                "turned by EXIF": _is_turned(image),
                "animated": kind != "JPEG" and getattr(image, "n_frames", 1) > 1,
                "huge": image.width * image.height > _HUGE,
                f"{kind} by another name": not _is_named(name, kind),
            }
    return [kind, *(peculiarity for peculiarity, applies in peculiarities.items() if applies)]


def open_image(encoded: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """PIL's image, nothing decoded yet. Whatever opens an image opens it here.

    Left to itself, PIL tries all of its decoders whatever a file is called; the one for PostScript starts Ghostscript.

    Args:
        formats: as PIL calls them; no other decoder sees the bytes.
    """
    return Image.open(io.BytesIO(encoded), formats=formats)


def decode_rgb(encoded: bytes, name: str) -> Image.Image:
    """An image to be shown. Raises UserError naming it if it cannot be decoded."""
    try:
        return open_image(encoded).convert("RGB")
    except Exception as error:  # a decoder raises anything from OSError to struct.error
        raise UserError(f"{name} cannot be read as an image: {reason_of(error)}", "give another one") from error


def check_header(encoded: bytes) -> None:
    """Looks at the ends of an image, in 3 us if it is a JPEG; raises some error for what need not be decoded to fail.

    It finds what DALI would decode nevertheless: bombs, and a JPEG that is cut off below the part that is asked for.
    """
    if not encoded:
        raise OSError("empty file")
    if encoded.startswith(b"\xff\xd8"):
        _check_jpeg(encoded)
    else:
        open_image(encoded)


def _check_jpeg(encoded: bytes) -> None:
    """Walks over the segments of the header, then looks for the end of the image behind them (ITU T.81, annex B)."""
    at = 2
    try:
        for _ in range(_MOST_MARKERS):
            marker = encoded[at + 1]
            if marker == _START_OF_SCAN:
                break
            if encoded[at] != 0xFF:
                return  # rubbish between the segments; the decoder may find its way
            if marker in _START_OF_FRAME:
                _check_frame(*struct.unpack_from(">BHH", encoded, at + 4))
            # a marker may have any number of 0xFF before it
            at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
        else:
            raise OSError(f"more than {_MOST_MARKERS} markers in its header")
    except (IndexError, struct.error):
        raise OSError("image file is truncated in its header") from None
    if encoded.rfind(b"\xff\xd9", at) < 0:
        raise OSError("image file is truncated")


def _check_frame(precision: int, height: int, width: int) -> None:
    if precision != 8:
        raise OSError(f"{precision} bits a channel, only 8 are decoded")
    if not width or not height:
        raise OSError(f"the header claims a size of {width} x {height}")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{width} x {height} pixels, taken for a decompression bomb")


def _is_turned(image: Image.Image) -> bool:
    with suppress(Exception):  # damaged EXIF raises anything, and nothing here depends on it
        return image.getexif().get(_ORIENTATION, 1) != 1
    return False


def _is_named(name: str, kind: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _EXTENSIONS.get(kind, (f".{kind.lower()}",))


def reason_of(error: Exception) -> str:
    """One line of why an image cannot be read or decoded."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = printable(str(error).splitlines()[0]) if str(error) else type(error).__name__
    return "not an image that the pipeline decodes" if "cannot identify image file" in text else text

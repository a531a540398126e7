"""The images that figures show: made as evaluation makes them, with their true class where it is known."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm.data import ImageNetInfo, create_transform, is_img_extension
from torch import Tensor

from contextual_cnn.data.bad_images import BadImage
from contextual_cnn.data.image_check import decode_rgb
from contextual_cnn.data.on_device import normalise
from contextual_cnn.data.reader import read_image
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.errors import UserError
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.text import printable


class Images(NamedTuple):
    """B images.

    names: of their files, printable.
    pixels: (B, S, S, 3) uint8, what the model sees, before the normalisation.
    inputs: (B, 3, S, S) float32, normalised.
    labels: their classes' indices; None where the class is not known.
    """

    names: list[str]
    pixels: np.ndarray
    inputs: Tensor
    labels: list[int | None]


class ImageMaker:
    """Makes images as timm's evaluation does."""

    def __init__(self, settings: DataSettings, device: torch.device) -> None:
        # For its prefetching loader timm gives the pixels, which is what the figures show
        self._transform = create_transform(
            settings.image_size,
            interpolation=settings.interpolation,
            crop_pct=settings.crop_pct,
            use_prefetcher=True,
        )
        self._mean, self._std, self._device = settings.mean, settings.std, device

    def from_files(self, paths: Sequence[Path], classes: Sequence[str]) -> Images:
        """A file's class is the name of the folder that it is in, if that is a class."""
        index = {name: i for i, name in enumerate(classes)}
        encoded = [_read(path) for path in paths]
        labels = [index.get(printable(path.parent.name)) for path in paths]
        return self._make([printable(path.name) for path in paths], encoded, labels)

    def from_source(self, source: ImageSource, indices: Sequence[int]) -> Images:
        try:
            encoded = [read_image(source, i) for i in indices]
        except BadImage as bad:
            raise UserError(f"the image {bad.name} cannot be used: {bad.reason}", "--images FILE_OR_FOLDER") from bad
        return self._make([source.name(i) for i in indices], encoded, [int(source.targets[i]) for i in indices])

    def _make(self, names: list[str], encoded: list[bytes], labels: list[int | None]) -> Images:
        pixels = torch.stack([self._transform(decode_rgb(*image)) for image in zip(encoded, names, strict=True)])
        inputs = normalise(pixels.to(self._device), self._mean, self._std)
        return Images(names, pixels.permute(0, 2, 3, 1).numpy(), inputs, labels)


def find_images(given: Sequence[Path], most: int) -> list[Path]:
    """The files given and those below the folders given; if they are more than `most`, evenly spread ones.

    Raises:
        UserError: a path that is not there, or a folder without images.
    """
    found = []
    for path in given:
        if not path.exists():
            raise UserError(f"--images: there is no {path}", "give image files, or folders of them")
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if is_img_extension(f.suffix.lower()))
        if not files:
            raise UserError(f"--images: {path} holds no images", "give image files, or folders of them")
        found += files
    return [found[i] for i in spread(len(found), most)]


def spread(count: int, most: int) -> list[int]:
    """At most so many of 0 .. count - 1, evenly spread: the middles of `most` equal parts."""
    return [(2 * i + 1) * count // (2 * most) for i in range(most)] if count > most else list(range(count))


def readable_names(classes: Sequence[str]) -> list[str]:
    """Names for people: what WordNet's ids of ImageNet mean, the character of a code point, others as they are."""
    imagenet = ImageNetInfo()
    known = set(imagenet.label_names())
    return [_readable(name, imagenet if name in known else None) for name in classes]


def _readable(name: str, imagenet: ImageNetInfo | None) -> str:
    if imagenet is not None:
        return imagenet.label_name_to_description(name).split(",")[0]
    return chr(int(name[2:], 16)) if re.fullmatch(r"U\+[0-9A-F]{4}", name) else name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the image {path} cannot be read: {error.strerror}", "give another file") from error

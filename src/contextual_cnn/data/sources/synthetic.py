"""As many images as ImageNet has, of noise, and no disk: to try a command out, and to time all but the reading."""

import functools
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from contextual_cnn.data.sources.names import Indices
from contextual_cnn.data.sources.source import ImageSource
from contextual_cnn.randomness import Purpose, generator

_IMAGES = {"train": 1_281_167, "val": 50_000}
_CLASSES = 1000
_DIFFERENT = 16
_GRAIN = 3  # pixels; makes a JPEG of 500 x 375 as large as ImageNet's mean, 112 kB


class SyntheticImages(ImageSource):
    """numbers: of the images, in their order. An image's number is its class, and its noise, over and over again."""

    def __init__(self, split: str, classes: tuple[str, ...], numbers: np.ndarray) -> None:
        self.split, self.classes, self.numbers = split, classes, numbers
        self.targets = numbers % len(classes)

    def name(self, index: int) -> str:
        return f"{self.split}/{self.numbers[index]}"

    def read(self, index: int) -> bytes:
        return _encoded(int(self.numbers[index]) % _DIFFERENT)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"numbers": self.numbers}

    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> "SyntheticImages":
        return SyntheticImages(self.split, self.classes, arrays["numbers"])

    def take(self, indices: Indices) -> "SyntheticImages":
        return SyntheticImages(self.split, self.classes, self.numbers[np.asarray(indices, dtype=np.int64)])


def open_synthetic(root: Path, split: str, classes: tuple[str, ...] | None = None) -> SyntheticImages:
    """root: nothing is looked for there."""
    classes = classes or tuple(f"class_{i:03}" for i in range(_CLASSES))
    return SyntheticImages(split, classes, np.arange(_IMAGES[split]))


@functools.cache
def _encoded(number: int) -> bytes:
    noise = generator(Purpose.SYNTHETIC, number).integers(0, 256, (375 // _GRAIN, 500 // _GRAIN, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()

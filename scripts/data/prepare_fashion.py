"""Writes Fashion-MNIST, photographs of clothes, as JPEG folders in ImageNet's layout.

python scripts/data/prepare_fashion.py FOLDER [--source FOLDER]

The source is the data set as Debian ships it (apt-get install dataset-fashion-mnist): 60,000 training and 10,000 test
images of ten articles, 28 x 28 grey (Xiao, Rasul, Vollgraf, 2017). A black margin brings them to 40 x 40, for training
to crop from.
"""

import argparse
import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from contextual_cnn.errors import UserError, run_script

SOURCE = Path("/usr/share/datasets/fashion-mnist")
ARTICLES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot"]
SIDE, MARGIN = 28, 6  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the four .gz files")
    parser.add_argument("--train", type=int, default=6000, help="images per class, at most 6,000")
    parser.add_argument("--val", type=int, default=1000, help="images per class, at most 1,000")
    arguments = parser.parse_args()
    for split, prefix, count in (("train", "train", arguments.train), ("val", "t10k", arguments.val)):
        images = read_idx(arguments.source / f"{prefix}-images-idx3-ubyte.gz", 3)
        labels = read_idx(arguments.source / f"{prefix}-labels-idx1-ubyte.gz", 1)
        if len(images) != len(labels) or images.shape[1:] != (SIDE, SIDE) or labels.max() >= len(ARTICLES):
            raise UserError(f"{prefix}: {images.shape} images, {len(labels)} labels", "the files are not Fashion-MNIST")
        for label, article in enumerate(ARTICLES):
            write(images[labels == label][:count], arguments.folder / split / article)
        print(f"{arguments.folder / split}: {len(ARTICLES)} articles, up to {count} images each")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """MNIST's own format: two zero bytes, type 8 (bytes), the number of dimensions, the sizes, the data."""
    if not path.is_file():
        raise UserError(f"there is no {path}", "apt-get install dataset-fashion-mnist, or --source FOLDER")
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        data = b""
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} is not an idx file of {dimensions} dimensions", "take the file as it was published")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != np.prod(shape, dtype=object):
        raise UserError(
            f"{path} is cut off: {len(data) - header} bytes for {shape}", "take the file as it was published"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def write(images: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(np.pad(image, MARGIN)).convert("RGB").save(folder / f"{i:04d}.jpg", quality=95)


if __name__ == "__main__":
    run_script(main)

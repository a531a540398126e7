"""Archives of the structure of the official ones: 6 classes of a few small images."""

import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from contextual_cnn.data.imagenet_archives import OFFICIAL_SUMS

TRAIN, VAL, DEVKIT = OFFICIAL_SUMS
WNIDS = ("n00000009", "n00000002", "n00000005", "n00000003", "n00000008", "n00000001")  # in the devkit's order
COUNTS = (5, 8, 6, 7, 5, 9)
VAL_IDS = (3, 1, 6, 2, 5, 4, 1, 1, 2, 6, 3, 4)  # count from 1, in the order of the val images' names


def write_archives(folder: Path, photos: list[np.ndarray]) -> Path:
    """Writes the three archives and sums.txt; among the images are a PNG, a grey and a CMYK JPEG."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def picture(number: int) -> bytes:
        top, left = rng.integers(0, 300, size=2)
        image = Image.fromarray(photos[number % 2][top : top + 60 + number % 5, left : left + 90])
        buffer = io.BytesIO()
        mode = {3: "L", 4: "CMYK"}.get(number, "RGB")
        image.convert(mode).save(buffer, "PNG" if number == 5 else "JPEG")
        return buffer.getvalue()

    numbers = iter(range(100))
    class_tars = []
    for wnid, count in zip(WNIDS, COUNTS, strict=True):
        images = [(f"{wnid}_{count - 1 - i}.JPEG", picture(next(numbers))) for i in range(count)]
        class_tars.append((f"{wnid}.tar", tar_of(images)))
    (folder / TRAIN).write_bytes(tar_of(class_tars))
    val = [(f"ILSVRC2012_val_{i:08d}.JPEG", picture(next(numbers))) for i in range(1, len(VAL_IDS) + 1)]
    (folder / VAL).write_bytes(tar_of(reversed(val)))
    write_devkit(folder, COUNTS, VAL_IDS)
    return folder


def write_devkit(folder: Path, counts: Iterable[int], val_ids: Iterable[int]) -> None:
    """The devkit and the sums of all archives; an inner node is among the synsets, as in the official one."""
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows = [
        (i, wnid, "word, other word", "gloss", 0, [], 0, n)
        for i, (wnid, n) in enumerate(zip(WNIDS, counts, strict=True), 1)
    ]
    rows.append((7, "n00000077", "entity", "gloss", 2, [1, 2], 1, 0))
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in [*names, "num_train_images"]])
    for i, row in enumerate(rows):
        synsets[i, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    root = "ILSVRC2012_devkit_t12"
    files = [
        (f"{root}/readme.txt", b"read me"),
        (f"{root}/data/meta.mat", meta.getvalue()),
        (f"{root}/data/ILSVRC2012_validation_ground_truth.txt", "".join(f"{i}\n" for i in val_ids).encode()),
    ]
    (folder / DEVKIT).write_bytes(tar_of(files, "w:gz"))
    write_sums(folder)


def write_sums(folder: Path) -> None:
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in OFFICIAL_SUMS]
    (folder / "sums.txt").write_text("".join(lines))


def tar_of(files: Iterable[tuple[str, bytes]], mode: str = "w", **fields) -> bytes:
    """A tar in memory; fields are set on every member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_tar(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}


def expected_images(folder: Path) -> dict[str, dict[str, tuple[bytes, str]]]:
    """split -> file name -> (bytes, WordNet id), worked out from the archives in the simplest way."""
    train = {
        name: (data, class_tar.removesuffix(".tar"))
        for class_tar, content in read_tar((folder / TRAIN).read_bytes()).items()
        for name, data in read_tar(content).items()
    }
    val = sorted(read_tar((folder / VAL).read_bytes()).items())
    return {
        "train": train,
        "val": {name: (data, WNIDS[i - 1]) for (name, data), i in zip(val, VAL_IDS, strict=True)},
    }

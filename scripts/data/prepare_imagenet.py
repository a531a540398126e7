"""Makes a data set for training from the official ImageNet archives (ILSVRC 2012).

python scripts/data/prepare_imagenet.py ARCHIVES ROOT --layout folders|list|shards

ARCHIVES is the folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, as they
were downloaded. Their MD5 sums and the numbers of classes and images are checked. The images are copied byte for byte
unless --resize is given. The same command goes on after an interruption; no file is ever visible half written.
"""

import argparse
import fcntl
import functools
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from contextual_cnn.data.image_check import open_image
from contextual_cnn.data.imagenet_archives import (
    OFFICIAL_SUMS,
    ArchivedImage,
    Archives,
    Devkit,
    check_md5,
    find_archives,
    list_class,
    list_class_archives,
    list_val,
    read_devkit,
)
from contextual_cnn.data.process_pool import process_pool, progress_bar, run_parts
from contextual_cnn.data.sources import find_layout, open_source
from contextual_cnn.data.sources.shard_index import write_shard
from contextual_cnn.errors import UserError, run_script

RECORD, LOCK = "prepare_imagenet.json", ".prepare_imagenet.lock"


def main() -> None:
    arguments = parse_arguments()
    archives = find_archives(arguments.archives)
    arguments.root.mkdir(parents=True, exist_ok=True)
    with (arguments.root / LOCK).open("w") as lock:  # held by the worker processes too, as long as one lives
        take(lock, arguments.root)
        record = Record.open(arguments, archives)
        record.check_sums(archives, read_sums(arguments.sums))
        devkit = read_devkit(archives.devkit)
        with process_pool(arguments.workers) as pool:
            images = list_images(pool, archives, devkit)
            parts = make_parts(arguments, devkit, images)
            sizes = [len(part.images) for part in parts]
            run_parts(pool, functools.partial(write_part, arguments), parts, title="images", sizes=sizes)
        write_lists(arguments, devkit, images)
    print_summary(arguments, images)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__.rpartition("\n\n")[2],
    )
    parser.add_argument("archives", type=Path, help="folder with the three archives")
    parser.add_argument("root", type=Path, help="folder to write to, data.root of the training")
    parser.add_argument(
        "--layout",
        choices=["folders", "list", "shards"],
        default="folders",
        help="class folders; flat folders with list files; webdataset tar shards, shuffled, with indices "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--resize", type=int, metavar="PIXELS", help="shrink training images to this shorter side; val is never changed"
    )
    parser.add_argument(
        "--quality", type=int, default=90, help="JPEG quality where --resize shrinks (default %(default)s)"
    )
    parser.add_argument(
        "--shard-images", type=int, default=5000, metavar="N", help="images in each (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the images' order in the shards (default %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--sums", type=Path, metavar="FILE", help="sums of other archives, written by md5sum")
    arguments = parser.parse_args()
    for name, low, high in (("resize", 32, 4096), ("quality", 1, 95), ("shard_images", 1, 10**6), ("workers", 1, 1024)):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}")
    return arguments


def take(lock: io.TextIOBase, root: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another prepare_imagenet.py writes to {root}", "wait for it, or use another root") from error


class Record:
    """What ROOT is made from, in ROOT/prepare_imagenet.json: another run must go on with the same settings."""

    def __init__(self, path: Path, settings: dict, checked: dict) -> None:
        self.path, self.settings, self.checked = path, settings, checked

    @classmethod
    def open(cls, arguments: argparse.Namespace, archives: Archives) -> "Record":
        path = arguments.root / RECORD
        settings = {key: getattr(arguments, key) for key in ("layout", "resize", "quality", "shard_images", "seed")}
        if not path.exists():
            if any(not entry.name.startswith(".") for entry in arguments.root.iterdir()):
                raise UserError(f"{arguments.root} is not empty, and not made by this script", "use a new folder")
            if not arguments.resize:
                check_space(arguments.root, archives)
            return cls(path, settings, {})
        try:
            content = json.loads(path.read_text())
            before, checked = dict(content["settings"]), dict(content["checked"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}", "remove the root and start anew") from error
        if before != settings:
            changed = [f"--{k.replace('_', '-')} {before.get(k)}" for k in settings if before.get(k) != settings[k]]
            raise UserError(
                f"{arguments.root} was begun with other settings: {' '.join(changed)}",
                "give the same ones, or use another root",
            )
        return cls(path, settings, checked)

    def check_sums(self, archives: Archives, sums: dict[str, str]) -> None:
        """Checks the MD5 of the archives that have not been checked, or have changed since."""
        stamps = {path.name: [sums.get(path.name), path.stat().st_size, path.stat().st_mtime_ns] for path in archives}
        todo = [path for path in archives if self.checked.get(path.name) != stamps[path.name]]
        if not todo:
            return
        with progress_bar() as bar:
            for path in todo:
                if path.name not in sums:
                    raise UserError(f"--sums names no {path.name}", "write it with md5sum in the archives' folder")
                task = bar.add_task(f"MD5 of {path.name}, MiB", total=path.stat().st_size >> 20)
                check_md5(path, sums[path.name], lambda count, task=task: bar.advance(task, count / 2**20))
                self.checked[path.name] = stamps[path.name]
                record = {"settings": self.settings, "checked": self.checked}
                write_text(self.path, json.dumps(record, indent=2) + "\n")


def read_sums(file: Path | None) -> dict[str, str]:
    if file is None:
        return OFFICIAL_SUMS
    try:
        lines = [line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip()]
        return {Path(name.removeprefix("*")).name: md5 for md5, name in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"--sums {file} cannot be read: {error}", "write it with md5sum FILE ...") from error


def list_images(pool, archives: Archives, devkit: Devkit) -> dict[str, list[ArchivedImage]]:
    """Every image of both splits, where it lies in its archive."""
    class_archives = list_class_archives(archives.train, devkit.classes)
    parts = list(zip(class_archives, range(len(devkit.classes)), devkit.train_images, strict=True))
    of_class = run_parts(pool, functools.partial(list_part, archives.train), parts, title="train archive, classes")
    train = [image for images in of_class for image in images]
    if len({image.name for image in train}) < len(train):
        raise UserError(f"{archives.train} has two images of one name", "use the official archives")
    return {"train": train, "val": list_val(archives.val, devkit.val_targets)}


def list_part(archive: Path, part: tuple) -> list[ArchivedImage]:
    return list_class(archive, *part)


def check_space(root: Path, archives: Archives) -> None:
    """Images that are not resized take what the archives take."""
    needed, free = sum(path.stat().st_size for path in archives), shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{root} has {free >> 30} GiB of room, the images have {needed >> 30} GiB",
            "use another disk, or --resize 256",
        )


class Part(NamedTuple):
    """What one process writes at a time: the files of a class, or a shard."""

    path: Path
    split: str
    images: list[ArchivedImage]


def make_parts(arguments: argparse.Namespace, devkit: Devkit, images: dict[str, list[ArchivedImage]]) -> list[Part]:
    parts = []
    for split, of_split in images.items():
        folder = arguments.root / split
        if arguments.layout == "shards":
            order, size = np.random.default_rng(arguments.seed).permutation(len(of_split)), arguments.shard_images
            for number, start in enumerate(range(0, len(order), size)):
                shard = folder / f"{split}-{number:06d}.tar"
                parts.append(Part(shard, split, [of_split[i] for i in order[start : start + size]]))
        else:
            of_class = [[] for _ in devkit.classes]
            for image in of_split:
                of_class[image.target].append(image)
            for wnid, of_target in zip(devkit.classes, of_class, strict=True):
                parts.append(Part(folder / wnid if arguments.layout == "folders" else folder, split, of_target))
    return parts


def write_part(arguments: argparse.Namespace, part: Part) -> None:
    """Writes what is not there yet; each file appears under its name when it is whole."""
    shorter = arguments.resize if part.split == "train" else None
    try:
        if arguments.layout == "shards":
            part.path.parent.mkdir(parents=True, exist_ok=True)
            if not part.path.exists():
                write_shard(part.path, samples_of(part.images, shorter, arguments.quality))
            return
        part.path.mkdir(parents=True, exist_ok=True)
        for image in part.images:
            file = part.path / image.name
            if not file.exists():
                partial = file.with_name(f".{file.name}.partial")
                partial.write_bytes(encode(image, shorter, arguments.quality))
                partial.replace(file)
    except OSError as error:
        raise UserError(f"{part.path} cannot be written: {error}", "make room; the same command goes on") from error


def samples_of(images: list[ArchivedImage], shorter: int | None, quality: int) -> Iterator[tuple[str, bytes, int]]:
    for image in images:
        yield f"{Path(image.name).stem}.jpg", encode(image, shorter, quality), image.target


def encode(image: ArchivedImage, shorter: int | None, quality: int) -> bytes:
    """The image's bytes; encoded anew only if its shorter side is above `shorter`."""
    encoded = image.read()
    if shorter is None:
        return encoded
    try:
        with open_image(encoded) as picture:
            width, height = picture.size
            if min(width, height) <= shorter:
                return encoded
            size = (width * shorter // min(width, height), height * shorter // min(width, height))
            small = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{image.archive}: {image.name} cannot be decoded: {error}", "prepare without --resize"
        ) from error
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_lists(arguments: argparse.Namespace, devkit: Devkit, images: dict[str, list[ArchivedImage]]) -> None:
    """The names of the classes, and the lists of the list layout."""
    if arguments.layout != "folders":
        write_text(arguments.root / "classes.txt", "".join(f"{wnid}\n" for wnid in devkit.classes))
    if arguments.layout == "list":
        for split, of_split in images.items():
            by_class = sorted(of_split, key=lambda image: (image.target, image.name))
            lines = (f"{split}/{image.name} {image.target}\n" for image in by_class)
            write_text(arguments.root / f"{split}.txt", "".join(lines))


def print_summary(arguments: argparse.Namespace, images: dict[str, list[ArchivedImage]]) -> None:
    """Opens the result as training does and compares the numbers."""
    classes = None
    for split, of_split in images.items():
        source = open_source(arguments.root, split, find_layout(arguments.root, split), classes)
        classes = source.classes
        expected = np.bincount([image.target for image in of_split], minlength=len(classes))
        if not np.array_equal(np.bincount(source.targets, minlength=len(classes)), expected):
            raise UserError(
                f"{arguments.root} has {len(source)} {split} images, the archives have {len(of_split)}",
                "something else wrote to the folder; remove it and start anew",
            )
        print(f"{arguments.root}: {split} has {len(source)} images of {len(classes)} classes")
    print(f"train on it with data.root={arguments.root}; look for damaged images with scripts/data/check_data.py")


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    run_script(main)

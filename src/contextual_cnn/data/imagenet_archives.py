"""The official ImageNet archives (ILSVRC 2012): checked, and their images listed where they lie. Nothing is extracted.

ILSVRC2012_img_train.tar       a tar of one tar per class, n01440764.tar ...
ILSVRC2012_img_val.tar         a flat tar, ILSVRC2012_val_00000001.JPEG ...
ILSVRC2012_devkit_t12.tar.gz   the classes, their training images' number, the classes of the val images
"""

import hashlib
import io
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.imagenet import ARCHIVE_META

from contextual_cnn.data.sources.tar_members import TarMember, check_member, list_tar
from contextual_cnn.errors import UserError

OFFICIAL_SUMS = dict(ARCHIVE_META.values())  # file name -> MD5, in the order train, val, devkit
_MEMBER_LIMIT = 64 * 2**20  # bytes; the largest official image has less than a quarter of it
_DEVKIT_MEMBERS = 10_000
_CLASS, _IMAGE = re.compile(r"n\d{8}"), re.compile(r"\w[\w.-]*\.JPEG", re.ASCII)


class Archives(NamedTuple):
    """The three files."""

    train: Path
    val: Path
    devkit: Path


class Devkit(NamedTuple):
    """classes: WordNet ids in sorted order, as torchvision and timm number them. train_images: of each class.
    val_targets: of each val image, in the order of their names.
    """

    classes: tuple[str, ...]
    train_images: tuple[int, ...]
    val_targets: tuple[int, ...]


class ArchivedImage(NamedTuple):
    """An image file inside an archive; name: without folders, unique in its split."""

    name: str
    archive: Path
    offset: int
    size: int
    target: int

    def read(self) -> bytes:
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def find_archives(folder: Path) -> Archives:
    """Looks for the three files. Raises UserError naming those that are missing."""
    archives = Archives(*(folder / name for name in OFFICIAL_SUMS))
    missing = [path.name for path in archives if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}",
            "download it from image-net.org (ILSVRC 2012, with an account) and keep its name",
        )
    return archives


def check_md5(path: Path, expected: str, advance: Callable[[int], object]) -> None:
    """Raises UserError if the file's MD5 is another. advance: is told the bytes that have been read."""
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            md5.update(chunk)
            advance(len(chunk))
    if md5.hexdigest() != expected:
        raise UserError(
            f"{path} has the MD5 {md5.hexdigest()}, expected {expected}: it is damaged or another file",
            "download it again; for archives of your own --sums FILE, written by md5sum",
        )


def read_devkit(path: Path) -> Devkit:
    """The classes and the val images' targets.

    Raises:
        UserError: no development kit, or one that does not fit together.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("reading the devkit's meta.mat needs scipy", "pip install scipy") from error
    files = _read_from_devkit(path, ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))
    try:
        synsets = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        class_of_id = {int(i): str(wnid) for i, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
        images = {str(w): int(n) for w, n in zip(leaves["WNID"], leaves["num_train_images"], strict=True)}
        ids = [int(line) for line in files["ILSVRC2012_validation_ground_truth.txt"].split()]
        classes = tuple(sorted(images))
        targets = {wnid: target for target, wnid in enumerate(classes)}
        val_targets = tuple(targets[class_of_id[i]] for i in ids)
    except Exception as error:  # a damaged .mat raises anything
        raise UserError(
            f"{path}: the classes or the val images' classes cannot be read ({type(error).__name__}: {error})",
            f"use the official {path.name}",
        ) from error
    if not classes or not all(_CLASS.fullmatch(wnid) for wnid in classes):
        raise UserError(f"{path} names classes that are no WordNet ids (n01440764)", f"use the official {path.name}")
    return Devkit(classes, tuple(images[wnid] for wnid in classes), val_targets)


def _read_from_devkit(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Some members by their last name, from a stream that is never unpacked further than the limits."""
    found = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for count, info in enumerate(archive):
                if info.size > _MEMBER_LIMIT or count >= _DEVKIT_MEMBERS:
                    raise UserError(
                        f"{path} unpacks to more than a development kit has ({info.name!r}, {info.size} bytes)",
                        f"use the official {path.name}",
                    )
                name = info.name.rpartition("/")[2]
                if name in names:
                    check_member(info, path)
                    member = archive.extractfile(info)
                    assert member is not None  # a plain file, as has been checked
                    found[name] = member.read()
    except UserError:
        raise
    except Exception as error:  # zlib and tarfile raise anything about hostile bytes
        raise UserError(f"{path} cannot be read: {error}", "download it again") from error
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path} holds no {' and no '.join(missing)}", f"use the official {path.name}")
    return found


def list_class_archives(path: Path, classes: tuple[str, ...]) -> list[TarMember]:
    """The tars in the train archive, one per class in the order of `classes`. Raises UserError if they are others."""
    members = {member.name.removesuffix(".tar"): member for member in list_tar(path)}
    if strange := sorted(set(members) ^ set(classes)):
        raise UserError(
            f"{path} has {len(members)} classes, the devkit {len(classes)}; they differ in {', '.join(strange[:3])}",
            "use the archives of one and the same release",
        )
    return [members[wnid] for wnid in classes]


def list_class(path: Path, archive: TarMember, target: int, expected: int) -> list[ArchivedImage]:
    """The images of one class in the train archive, sorted by name.

    Raises:
        UserError: a member that is no plain image file, or another number than expected.
    """
    members = list_tar(path, archive.offset, archive.offset + archive.size)
    images = _images(path, archive.name, members, expected)
    return [ArchivedImage(member.name, path, member.offset, member.size, target) for member in images]


def list_val(path: Path, targets: tuple[int, ...]) -> list[ArchivedImage]:
    """The val images, sorted by name, which is the order of their targets. Raises UserError as `list_class`."""
    images = _images(path, path.name, list_tar(path), len(targets))
    return [
        ArchivedImage(member.name, path, member.offset, member.size, target)
        for member, target in zip(images, targets, strict=True)
    ]


def _images(path: Path, archive: str, members: list[TarMember], expected: int) -> list[TarMember]:
    for member in members:
        if not _IMAGE.fullmatch(member.name) or member.size > _MEMBER_LIMIT:
            raise UserError(
                f"{path}: {archive} holds {member.name!r} of {member.size} bytes, which is none of ImageNet's images",
                "use the official archives",
            )
    names = Counter(member.name for member in members)
    if len(members) != expected or len(names) != expected:
        raise UserError(
            f"{path}: {archive} holds {len(members)} images ({len(names)} names), the devkit says {expected}",
            "use the archives of one and the same release",
        )
    return sorted(members)

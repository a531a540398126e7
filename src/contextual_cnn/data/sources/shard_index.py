"""Where the samples of one webdataset shard are, and writing a shard with its index.

A shard is a plain tar. A sample is KEY.jpg (or .jpeg, .png) and KEY.cls (its class index, ASCII) next to each other.
Beside NAME.tar there may be, and writing puts there,

    NAME.idx       DALI's index (`wds2idx`, v1.2): a line per sample with extension, offset, size, name of each member
    NAME.classes   the class of each sample, one a line; saves a read per sample where the run starts

Without them the tar's own headers and .cls members are read, once: the first process leaves both files behind where it
may. They are not trusted: every place must lie in the tar,
and the first and last sample are compared with the tar itself.
"""

import io
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contextual_cnn.data.sources.class_names import read_lines
from contextual_cnn.data.sources.names import Names
from contextual_cnn.data.sources.tar_members import BLOCK, TarMember, check_member, list_tar
from contextual_cnn.errors import UserError
from contextual_cnn.launcher import is_main_process

_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
_VERSION = "v1.2"
_LONGEST_CLASS = 16  # bytes of a .cls member


class ShardIndex(NamedTuple):
    """The samples of a shard. names: of the image members; offsets, sizes: of their bytes; all (n,)."""

    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    targets: np.ndarray


def read_shard_index(shard: Path) -> ShardIndex:
    """The samples of a shard, in its order.

    Raises:
        UserError: naming the shard and the sample, if anything does not fit together.
    """
    if not shard.is_file():  # to open a pipe would wait for somebody who writes
        raise UserError(f"{shard} is no file", "remove it, or copy the shard again")
    index, classes = shard.with_suffix(".idx"), shard.with_suffix(".classes")
    try:
        if index.is_file() and classes.is_file() and (found := _read_regular(shard, index, classes)) is not None:
            return found
        if index.is_file():
            return _read_samples(shard, _read_idx(index, shard), classes if classes.is_file() else None)
        members = list_tar(shard)
        found = _read_samples(shard, members, classes if classes.is_file() else None)
        _keep_index(shard, members, found.targets)
        return found
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {error}", "make it readable, or copy it again") from error


def _read_regular(shard: Path, index: Path, classes: Path) -> ShardIndex | None:
    """The samples by whole columns, where each line is NAME.jpg and NAME.cls, as `write_shard` and wds2idx write it.

    Ten times as fast as line by line. None where anything at all is otherwise: line by line is then found what.
    """
    fields, lines = index.read_bytes().split(), classes.read_bytes().split()
    count = len(lines)
    if len(fields) != 2 + 8 * count or not count or fields[:2] != [_VERSION.encode(), b"%d" % count]:
        return None
    images, labels = fields[5::8], fields[9::8]
    places = fields[3::8] + fields[4::8] + fields[7::8] + fields[8::8]
    if not (_are_numbers(places) and _are_numbers(lines) and _are_pairs(images, labels)):
        return None
    offsets, sizes, label_offsets, label_sizes = np.array(list(map(int, places)), dtype=np.int64).reshape(4, count)
    end = shard.stat().st_size
    if (
        min(offsets.min(), label_offsets.min()) < BLOCK
        or max((offsets + sizes).max(), (label_offsets + label_sizes).max()) > end
    ):
        return None
    targets = np.array(list(map(int, lines)), dtype=np.int64)
    names = Names.of_bytes(images)
    with shard.open("rb") as tar:
        for i in (0, -1):
            image = TarMember(names[i], int(offsets[i]), int(sizes[i]))
            label = TarMember(labels[i].decode("ascii"), int(label_offsets[i]), int(label_sizes[i]))
            if any(_header_before(tar.fileno(), member, shard) != member for member in (image, label)):
                return None
            if _read_class(tar.fileno(), label, shard) != targets[i]:
                return None
    return ShardIndex(names, offsets, sizes, targets)


def _are_numbers(fields: list[bytes]) -> bool:
    """Whether each is one that 64 bits hold."""
    return b"".join(fields).isdigit() and max(map(len, fields)) <= _LONGEST_CLASS


def _are_pairs(images: list[bytes], labels: list[bytes]) -> bool:
    """Whether they are KEY.jpg and KEY.cls, each key once and with no other dot, in plain ASCII."""
    text = b"\n".join(images)
    return (
        text.isascii()
        and text.count(b".") == len(images)
        and all(name.endswith(b".jpg") for name in images)
        and [name[:-3] + b"cls" for name in images] == labels
        and len(set(images)) == len(images)
    )


def _read_samples(shard: Path, members: list[TarMember], classes: Path | None) -> ShardIndex:
    parts = [(*_split(member.name), member) for member in members]
    samples = [_sample(shard, key, list(of_key)) for key, of_key in groupby(parts, itemgetter(0))]
    if not samples:
        raise UserError(f"{shard} holds no samples", "a sample is KEY.jpg and KEY.cls; remove the file")
    images = [image for image, _ in samples]
    if len({image.name for image in images}) < len(images):
        raise UserError(f"{shard} holds two samples of one name", "keys must be unique within a shard")
    return ShardIndex(
        Names.of(image.name for image in images),
        np.array([image.offset for image in images], dtype=np.int64),
        np.array([image.size for image in images], dtype=np.int64),
        np.array(_read_classes(shard, [cls for _, cls in samples], classes), dtype=np.int64),
    )


def check_shard_index(shard: Path) -> None:
    """Compares .idx and .classes with the whole tar. Raises UserError where they differ."""
    given, found = read_shard_index(shard), _read_samples(shard, list_tar(shard), None)
    if given.names != found.names or not all(map(np.array_equal, given[1:], found[1:])):
        raise UserError(
            f"{shard.with_suffix('.idx')} or {shard.with_suffix('.classes').name} differs from the samples in {shard}",
            f"remove them; `wds2idx {shard}` makes an index",
        )


def write_shard(shard: Path, samples: Iterable[tuple[str, bytes, int]]) -> None:
    """Writes a shard, its .idx and its .classes; the tar appears last and whole, or not at all.

    Args:
        samples: name of the image member, its bytes, its class.
    """
    lines, classes = [], []
    partial = shard.with_name(f".{shard.name}.partial")
    with partial.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, image, target in samples:
            key, _ = _split(name)
            places = []
            for member, data in ((name, image), (f"{key}.cls", b"%d" % target)):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                places.append(f"{member.removeprefix(f'{key}.')} {archive.offset + BLOCK} {len(data)} {member}")
                archive.addfile(info, io.BytesIO(data))
            lines.append(" ".join(places))
            classes.append(target)
    _write_text(shard.with_suffix(".idx"), [f"{_VERSION} {len(lines)}", *lines])
    _write_text(shard.with_suffix(".classes"), map(str, classes))
    partial.replace(shard)


def _keep_index(shard: Path, members: list[TarMember], targets: np.ndarray) -> None:
    """Writes what was found beside the shard, for the next start; where that may not be, or cannot, it is left."""
    if not is_main_process() or any(character.isspace() for member in members for character in member.name):
        return
    samples = groupby(members, lambda member: _split(member.name)[0])
    lines = [" ".join(f"{_split(m.name)[1]} {m.offset} {m.size} {m.name}" for m in of_key) for _, of_key in samples]
    with suppress(OSError, UnicodeEncodeError):
        _write_text(shard.with_suffix(".classes"), map(str, targets.tolist()))
        _write_text(shard.with_suffix(".idx"), [f"{_VERSION} {len(lines)}", *lines])


def _read_idx(index: Path, shard: Path) -> list[TarMember]:
    """The members that an index names; those of a sample stay together."""
    head, *lines = read_lines(index) or [""]
    stale = f"remove {index}; it is made again by `wds2idx {shard}`, and the run does without it"
    if head.split() != [_VERSION, str(len(lines))]:
        raise UserError(f"{index} begins with {head[:40]!r}, not with {_VERSION} and its {len(lines)} samples", stale)
    end, members = shard.stat().st_size, []
    for number, line in enumerate(lines, start=2):
        fields = line.split(" ")
        if len(fields) % 4:
            raise UserError(f"{index}, line {number}: not (extension offset size name) for each member", stale)
        for _, offset, size, name in zip(*(iter(fields),) * 4, strict=True):
            if not (_is_number(offset) and _is_number(size) and BLOCK <= int(offset) <= end - int(size)):
                raise UserError(f"{index}, line {number}: {name!r} at {offset}, {size} bytes, is not in {shard}", stale)
            members.append(TarMember(name, int(offset), int(size)))
    with shard.open("rb") as file:
        for member in (members[:1] + members[-1:]) if members else []:
            if _header_before(file.fileno(), member, shard) != member:
                raise UserError(f"{index} names {member.name!r} where {shard} holds something else", stale)
    return members


def _header_before(descriptor: int, member: TarMember, shard: Path) -> TarMember | None:
    """What the tar itself says of a member; None where there is no header."""
    try:
        info = tarfile.TarInfo.frombuf(os.pread(descriptor, BLOCK, member.offset - BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    info.offset_data = member.offset
    if not member.name.isascii() or len(member.name) > 100:  # the whole name is in an extension header
        info.name = member.name
    return check_member(info, shard)


def _sample(shard: Path, key: str, parts: list[tuple[str, str, TarMember]]) -> tuple[TarMember, TarMember]:
    """Image and class among the (key, extension, member) of a sample; other members are passed over."""
    images = [member for _, extension, member in parts if extension in _IMAGE_EXTENSIONS]
    classes = [member for _, extension, member in parts if extension == "cls"]
    if len(images) != 1 or len(classes) != 1:
        raise UserError(
            f"{shard}: sample {key!r} has {len(images)} images and {len(classes)} .cls members side by side",
            "a sample is one of KEY.jpg, KEY.jpeg, KEY.png, and KEY.cls with the class index",
        )
    return images[0], classes[0]


def _read_classes(shard: Path, members: list[TarMember], file: Path | None) -> list[int]:
    """The samples' classes, from the file beside the shard or from the .cls members."""
    with shard.open("rb") as tar:
        if file is None:
            return [_read_class(tar.fileno(), member, shard) for member in members]
        lines = read_lines(file)
        classes = [int(line) for line in lines] if all(map(_is_number, lines)) else []
        ends = [(i, _read_class(tar.fileno(), members[i], shard)) for i in (0, -1)]
    if len(classes) != len(members) or any(classes[i] != target for i, target in ends):
        raise UserError(f"{file} does not hold the classes of the {len(members)} samples of {shard}", f"remove {file}")
    return classes


def _read_class(descriptor: int, member: TarMember, shard: Path) -> int:
    text = os.pread(descriptor, min(member.size, _LONGEST_CLASS), member.offset).strip()
    if not text.isdigit() or member.size > _LONGEST_CLASS:
        raise UserError(
            f"{shard}: {member.name!r} holds {text!r}, no class index", "a .cls member is a number in ASCII"
        )
    return int(text)


def _is_number(text: str) -> bool:
    """Whether it is one that 64 bits hold."""
    return text.isascii() and text.isdigit() and len(text) <= _LONGEST_CLASS


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case extension; the key ends at the first dot of the last part, as webdataset has it."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name[:dot], name[dot + 1 :].lower()) if dot >= 0 else (name, "")


def _write_text(path: Path, lines: Iterable[str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)

"""Webdataset shards: DALI's own tools as witnesses, and tars and indices that lie."""

import gzip
import io
import os
import random
import tarfile
import tracemalloc

import pytest
from wds2idx import IndexCreator

from contextual_cnn.data.sources import shard_index, tar_shards
from contextual_cnn.data.sources.shard_index import read_shard_index, write_shard
from contextual_cnn.data.sources.tar_members import list_tar
from contextual_cnn.data.sources.tar_shards import open_tar_shards
from contextual_cnn.errors import UserError
from tests.conftest import run_python

SAMPLES = [(f"n{i:03d}.jpg", bytes([i]) * (100 + 400 * i), i % 3) for i in range(7)]


@pytest.fixture
def shard(tmp_path):
    (tmp_path / "train").mkdir()
    write_shard(tmp_path / "train" / "a.tar", SAMPLES)
    return tmp_path / "train" / "a.tar"


def read_all(shard):
    source = open_tar_shards(shard.parent.parent, "train")
    return [(source.name(i), source.read(i), int(source.targets[i])) for i in range(len(source))]


EXPECTED = [(f"train/a.tar:{name}", image, target) for name, image, target in SAMPLES]


@pytest.mark.parametrize("removed", [[], [".idx"], [".classes"], [".idx", ".classes"]])
def test_samples_are_the_same_with_and_without_index(shard, removed):
    for suffix in removed:
        shard.with_suffix(suffix).unlink()
    assert read_all(shard) == EXPECTED


def test_the_index_is_the_one_that_dalis_tool_writes(shard, tmp_path):
    with IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "theirs.idx").read_bytes() == shard.with_suffix(".idx").read_bytes()


def test_dalis_webdataset_reader_reads_what_is_written(shard):
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=7, num_threads=1, device_id=None)
    def pipeline():
        return tuple(
            fn.readers.webdataset(paths=[str(shard)], index_paths=[str(shard.with_suffix(".idx"))], ext=["jpg", "cls"])
        )

    built = pipeline()
    built.build()
    images, classes = built.run()
    for i, (_, image, target) in enumerate(SAMPLES):
        assert images.at(i).tobytes() == image
        assert classes.at(i).tobytes() == b"%d" % target


def test_any_writers_tar_is_read(tmp_path):
    """Folders, upper-case and other extensions, long and foreign names, other members; several shards."""
    (tmp_path / "train").mkdir()
    long = "é" * 80 + "x" * 80
    for number, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open(tmp_path / "train" / f"{number}.tar", "w", format=format) as archive:
            folder = tarfile.TarInfo("./")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, data in [
                (f"./{long}.JPEG", b"1"),
                (f"./{long}.cls", b"0\n"),
                (f"./{long}.json", b"{}"),
                ("b.seg.png", b"no"),
                ("b.cls", b"1"),
                ("b.png", b"2"),
            ]:
                add(archive, name, data)
    source = open_tar_shards(tmp_path, "train")
    assert [source.read(i) for i in range(4)] == [b"1", b"2"] * 2
    assert source.targets.tolist() == [0, 1] * 2
    assert source.shard_sizes.tolist() == [2, 2]
    assert source.name(3) == "train/1.tar:b.png"


def add(archive, name, data=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


HOSTILE = {
    "parent": dict(name="../evil.jpg"),
    "inner parent": dict(name="a/../../evil.jpg"),
    "absolute": dict(name="/etc/evil.jpg"),
    "control character": dict(name="evil\x1b[2J.jpg"),
    "symlink": dict(name="a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hardlink": dict(name="a.jpg", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": dict(name="a.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "fifo": dict(name="a.jpg", type=tarfile.FIFOTYPE),
    "sparse": dict(name="a.jpg", pax_headers={"GNU.sparse.size": str(10**12), "GNU.sparse.map": "0,1"}),
    "long name": dict(name="../" + "x" * 100_000),
}
# tarfile itself fails on these
MALFORMED = {
    "sparse map": {"GNU.sparse.size": "1", "GNU.sparse.map": "zero,one"},
    "sparse number": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "many"},
    "name of 2 MB": {"path": "../" + "x" * 2_000_000},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_members_are_refused(tmp_path, fields):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "fine.jpg")
        add(archive, **fields)
    with pytest.raises(UserError, match=r"a\.tar") as error:
        list_tar(tmp_path / "a.tar")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("headers", MALFORMED.values(), ids=MALFORMED.keys())
def test_headers_that_cannot_be_read_are_refused(tmp_path, headers):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a.jpg", pax_headers=headers)
    with pytest.raises(UserError, match=r"a\.tar") as error:
        list_tar(tmp_path / "a.tar")
    assert len(str(error.value)) < 1000


def forged_size(size):
    """The first header's size field, with a checksum that fits."""

    def change(tar):
        header = bytearray(tar[:512])
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + tar[512:]

    return change


LIES = {
    "8 GiB": forged_size(b"77777777777\0"),
    "negative": forged_size(b"\xff" * 12),
    "2**80": forged_size(b"\x80" + b"\0" + b"\1" + b"\0" * 9),
    "no number": forged_size(b"9x9999999999"),
    "gzip": gzip.compress,
    "empty": lambda tar: b"",
    "text": lambda tar: b"<html>404 not found</html>" * 100,
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES.keys())
def test_a_tar_that_lies_about_sizes_or_is_none_is_refused(shard, change):
    shard.write_bytes(change(shard.read_bytes()))
    shard.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=r"a\.tar"):
        read_shard_index(shard)


def test_a_tar_cut_anywhere_is_refused(shard):
    whole = shard.read_bytes()
    end = max(member.offset + member.size for member in list_tar(shard))
    shard.with_suffix(".idx").unlink()
    for length in [*range(0, end, 256), *range(0, end, 512), end]:
        shard.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tar"):
            read_shard_index(shard)


def test_a_damaged_header_is_not_taken_for_the_end(shard):
    member = list_tar(shard)[4]
    damaged = bytearray(shard.read_bytes())
    damaged[member.offset - 512] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.tar"):
        list_tar(shard)


def replaced(old, new):
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("v1.2", "v1.1"), r"a\.idx.*'v1\.1 7'"),
        (replaced("v1.2 7", "v1.2 8"), r"a\.idx.*'v1\.2 8'"),
        (lambda text: "", r"a\.idx.*''"),
        (replaced("jpg 512 ", "jpg 99999999 "), r"line 2.*\b99999999\b.*a\.tar"),
        (replaced("jpg 512 ", "jpg -512 "), "line 2"),
        (replaced("jpg 512 ", "jpg 0 "), "line 2"),
        (replaced("jpg 512 100 ", "jpg 512 99999999 "), "line 2"),
        (replaced("jpg 512 100 ", "jpg 512 "), "line 2"),
        (replaced("jpg 512 100 ", "jpg 1024 100 "), r"a\.idx.*'n000\.jpg'.*a\.tar"),
        (replaced("jpg 512 100 n000", "jpg 512 100 n009"), r"a\.idx.*'n009\.jpg'.*a\.tar"),
        (replaced("jpg 512 ", f"jpg {'5' * 5000} "), "line 2"),
    ],
)
def test_an_index_that_does_not_fit_its_tar_is_refused(shard, change, message):
    index = shard.with_suffix(".idx")
    index.write_text(change(index.read_text()))
    with pytest.raises(UserError, match=message) as error:
        read_shard_index(shard)
    assert error.value.fix.startswith(f"remove {index}")


@pytest.mark.parametrize(
    "text", ["", "0 1", "0 1 2 0 1 2 2", "x 1 2 0 1 2 0", "0 1 -2 0 1 2 0", f"0 {'1' * 20} 2 0 1 2 0"]
)
def test_classes_that_do_not_fit_the_tar_are_refused(shard, text):
    shard.with_suffix(".classes").write_text(text.replace(" ", "\n"))
    with pytest.raises(UserError, match=r"a\.classes.*\b7 samples"):
        read_shard_index(shard)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], r"a\.tar"),
        ([("a.jpg", b"x")], r"'a'.*\b1\b.*\b0\b"),
        ([("a.cls", b"1")], r"'a'.*\b0\b.*\b1\b"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], r"'a'.*\b2\b.*\b1\b"),
        ([("a.jpg", b"x"), ("b.cls", b"1")], r"'a'.*\b1\b.*\b0\b"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], r"'a\.cls'.*b'cat'"),
        ([("a.jpg", b"x"), ("a.cls", b"1" * 17)], r"'a\.cls'"),
        ([("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"0")] * 2, r"a\.tar"),
    ],
)
def test_incomplete_samples_are_named(tmp_path, members, message):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in members:
            add(archive, name, data)
    with pytest.raises(UserError, match=message):
        read_shard_index(tmp_path / "a.tar")


def test_classes_beyond_the_names_are_refused(shard):
    (shard.parent.parent / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"a\.tar.*class 2\b.*\b2 classes"):
        open_tar_shards(shard.parent.parent, "train")


FEW_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
from contextual_cnn.data.sources.tar_shards import open_tar_shards

open_now = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
source = open_tar_shards(Path(sys.argv[1]), "train")
print(*(source.read(i).decode() for i in range(len(source))))
del source
print(len(os.listdir("/proc/self/fd")) - open_now)
"""


@pytest.mark.run
def test_more_shards_than_descriptors(tmp_path):
    """In a process of its own: the limit is not this one's."""
    (tmp_path / "train").mkdir()
    for i in range(100):
        write_shard(tmp_path / "train" / f"{i:03d}.tar", [("a.jpg", b"%d" % i, 0)])
    done = run_python("-c", FEW_DESCRIPTORS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    read, left_open = done.stdout.splitlines()
    assert read.split() == [str(i) for i in range(100)]
    assert int(left_open) <= 1


def test_what_was_read_without_an_index_is_kept_as_one(shard, monkeypatch):
    """The same as wds2idx makes it; a folder that cannot be written is read all the same."""
    files = [shard.with_suffix(end) for end in (".idx", ".classes")]
    expected = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    with monkeypatch.context() as other_rank:
        other_rank.setenv("RANK", "1")
        first = read_all(shard)
    assert not any(file.exists() for file in files)
    assert read_all(shard) == first
    assert [file.read_text() for file in files] == expected
    assert sorted(path.name for path in shard.parent.iterdir()) == ["a.classes", "a.idx", "a.tar"]
    monkeypatch.setattr(shard_index, "list_tar", None)  # it is not read again
    assert read_all(shard) == first


def test_the_shards_that_are_read_now_stay_open(tmp_path, monkeypatch):
    """A window of 8 shards moves over 100, of which 20 may be open: each is opened once."""
    monkeypatch.setattr(tar_shards.resource, "getrlimit", lambda _: (40, 40))
    (tmp_path / "train").mkdir()
    for i in range(100):
        write_shard(tmp_path / "train" / f"{i:03d}.tar", [("a.jpg", b"%d" % i, 0)])
    source = open_tar_shards(tmp_path, "train")
    opened, os_open, draw = [], os.open, random.Random(0)
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(path) or os_open(path, flags))
    for start in range(0, 96, 8):
        for _ in range(100):
            index = start + draw.randrange(8)
            assert source.read(index) == b"%d" % index
    assert len(opened) == len(set(opened)) == 96


@pytest.mark.parametrize("number", ["3000000", "9" * 16])
def test_a_class_beyond_the_images_is_refused_before_it_takes_memory(tmp_path, number):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w") as archive:
        add(archive, "a.jpg")
        add(archive, "a.cls", number.encode())
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=f"class {number}"):
            open_tar_shards(tmp_path, "train")
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(60)  # to open a pipe waits for ever
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_called_a_shard_and_is_none_is_refused(shard, kind):
    shard.unlink()
    shard.with_suffix(".idx").unlink()
    shard.mkdir() if kind == "folder" else os.mkfifo(shard)
    with pytest.raises(UserError, match=r"a\.tar"):
        read_shard_index(shard)

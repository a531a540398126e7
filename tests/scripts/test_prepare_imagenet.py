"""From archives to every layout and back, through interruptions; archives that are damaged, incomplete or hostile."""

import fcntl
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from contextual_cnn.data.sources import find_layout, open_source
from contextual_cnn.errors import run_script
from scripts.data import prepare_imagenet
from tests.conftest import ROOT, run_command
from tests.helpers.archives import (
    COUNTS,
    DEVKIT,
    TRAIN,
    VAL,
    VAL_IDS,
    WNIDS,
    expected_images,
    read_tar,
    tar_of,
    write_archives,
    write_devkit,
    write_sums,
)
from tests.helpers.facts import tells
from tests.helpers.layouts import LAYOUTS


@pytest.fixture(scope="module")
def archives(tmp_path_factory, photos) -> Path:
    return write_archives(tmp_path_factory.mktemp("official") / "archives", photos)


@pytest.fixture
def prepare(monkeypatch, capfd):
    """Runs the script's main in this process, which forks nothing; returns exit status and what was printed."""

    def run(archives, root, *options):
        arguments = [archives, root, "--workers", "1", "--sums", archives / "sums.txt", *options]
        monkeypatch.setattr(sys, "argv", ["prepare_imagenet.py", *map(str, arguments)])
        try:
            run_script(prepare_imagenet.main)
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return run


def images_of(root, split):
    """file name without extension -> (bytes, class), through the source that training uses."""
    source = open_source(root, split, find_layout(root, split))
    names = [Path(source.name(i).rpartition(":")[2]).stem for i in range(len(source))]
    return {name: (source.read(i), source.classes[source.targets[i]]) for i, name in enumerate(names)}


def snapshot(root):
    """Every file's content; the record without the time stamps."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and path.name != prepare_imagenet.RECORD
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_images_byte_for_byte_with_their_classes(archives, prepare, tmp_path, layout):
    status, printed = prepare(archives, tmp_path, "--layout", layout, "--shard-images", "9")
    assert status == 0, printed
    assert tells(printed, "train", f"{sum(COUNTS)}", "images", "6", "classes")
    for split, expected in expected_images(archives).items():
        assert images_of(tmp_path, split) == {Path(name).stem: image for name, image in expected.items()}
    before = snapshot(tmp_path)
    assert not [name for name in before if "partial" in name]
    assert prepare(archives, tmp_path, "--layout", layout, "--shard-images", "9")[0] == 0
    assert snapshot(tmp_path) == before


def test_folders_and_list_have_the_same_order(archives, prepare, tmp_path):
    for layout in ("folders", "list"):
        assert prepare(archives, tmp_path / layout, "--layout", layout)[0] == 0
    for split in ("train", "val"):
        folders = open_source(tmp_path / "folders", split, "folders")
        listed = open_source(tmp_path / "list", split, "list")
        assert folders.classes == listed.classes == tuple(sorted(WNIDS))
        assert [folders.read(i) for i in range(len(folders))] == [listed.read(i) for i in range(len(listed))]
        assert folders.targets.tolist() == listed.targets.tolist()


def test_shards_are_shuffled_by_the_seed(archives, prepare, tmp_path):
    names = {}
    for seed in ("0", "1"):
        assert prepare(archives, tmp_path / seed, "--layout", "shards", "--shard-images", "16", "--seed", seed)[0] == 0
        source = open_source(tmp_path / seed, "train", "shards")
        assert source.shard_sizes.tolist() == [16, 16, 8]
        names[seed] = [source.name(i).rpartition(":")[2] for i in range(len(source))]
        assert names[seed] != sorted(names[seed])
    assert names["0"] != names["1"]
    assert sorted(names["0"]) == sorted(names["1"])


@pytest.mark.parametrize("layout", ["folders", "shards"])
def test_resizing_shrinks_training_images_only_and_keeps_small_ones(archives, prepare, tmp_path, layout):
    assert prepare(archives, tmp_path, "--layout", layout, "--resize", "62")[0] == 0
    expected = expected_images(archives)
    assert images_of(tmp_path, "val") == {Path(name).stem: image for name, image in expected["val"].items()}
    found, shrunk = images_of(tmp_path, "train"), 0
    for name, (original, wnid) in expected["train"].items():
        data, target = found[Path(name).stem]
        before, after = Image.open(io.BytesIO(original)), Image.open(io.BytesIO(data))
        assert target == wnid
        assert after.size == (90 * 62 // before.height if before.height > 62 else 90, min(62, before.height))
        assert (data == original) == (before.height <= 62)
        shrunk += before.height > 62
    assert 0 < shrunk < len(found)


# Its processes wait in front of the image after the fifth file, until the first process is gone
WAITING = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, ".")
from scripts.data import prepare_imagenet as script

first, encode = os.getpid(), script.encode

def finished():
    return sum(path.suffix in (".JPEG", ".tar") and path.name[0] != "." for path in Path(sys.argv[2]).rglob("*"))

def wait_and_encode(*image):
    while finished() >= 5 and os.getppid() == first:
        time.sleep(0.01)
    return encode(*image)

script.encode = wait_and_encode
script.main()
"""


@pytest.mark.run
@pytest.mark.parametrize("layout", ["list", "shards"])
def test_a_killed_run_goes_on_to_the_identical_result(archives, prepare, tmp_path, layout):
    """Killed while its processes write images; then run to its end."""
    root, done, options = tmp_path / "root", tmp_path / "done", ("--layout", layout, "--shard-images", "4")
    arguments = [archives, root, "--sums", archives / "sums.txt", "--workers", "2", *options]
    run = subprocess.Popen([sys.executable, "-c", WAITING, *map(str, arguments)], cwd=ROOT)
    while len(written(root)) < 3:
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    with (root / prepare_imagenet.LOCK).open() as lock:  # free as soon as the workers have ended too
        fcntl.flock(lock, fcntl.LOCK_EX)
    before = written(root)
    assert 0 < len(before) < (sum(COUNTS) + len(VAL_IDS)) // (4 if layout == "shards" else 1)
    status, printed = prepare(archives, root, *options)
    assert status == 0, printed
    assert before.items() <= written(root).items()  # nothing is done twice
    assert prepare(archives, done, *options)[0] == 0
    assert snapshot(root) == snapshot(done)


def written(root):
    """Finished images or shards and when they were written."""
    files = [path for path in root.rglob("*") if path.suffix in (".JPEG", ".tar") and not path.name.startswith(".")]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.run
def test_many_processes_write_the_same_as_one(archives, prepare, tmp_path):
    assert prepare(archives, tmp_path / "one", "--layout", "shards", "--shard-images", "9")[0] == 0
    arguments = [archives, tmp_path / "many", "--layout", "shards", "--shard-images", "9", "--workers", "3"]
    many = run_command("scripts/data/prepare_imagenet.py", *map(str, arguments), "--sums", str(archives / "sums.txt"))
    assert many.returncode == 0, many.stderr
    assert snapshot(tmp_path / "many") == snapshot(tmp_path / "one")


def test_other_settings_or_a_strangers_folder_are_refused(archives, prepare, tmp_path):
    assert prepare(archives, tmp_path / "a", "--layout", "list")[0] == 0
    status, printed = prepare(archives, tmp_path / "a", "--layout", "shards")
    assert status == 2
    assert tells(printed, "--layout")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    status, printed = prepare(archives, tmp_path / "b")
    assert status == 2
    assert tells(printed, str(tmp_path / "b"))


def test_two_runs_in_one_folder_are_refused(archives, prepare, tmp_path):
    with (tmp_path / prepare_imagenet.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, printed = prepare(archives, tmp_path)
    assert status == 2
    assert tells(printed, "prepare_imagenet.py")


@pytest.fixture
def spoiled(archives, tmp_path) -> Path:
    return Path(shutil.copytree(archives, tmp_path / "spoiled"))


def replace_in_train(folder, change):
    """Rewrites the tar of the first class; change gets and returns its bytes."""
    content = read_tar((folder / TRAIN).read_bytes())
    content[f"{WNIDS[0]}.tar"] = change(content[f"{WNIDS[0]}.tar"])
    (folder / TRAIN).write_bytes(tar_of(content.items()))


def with_first(data, name, **fields):
    """A tar whose first member has another name and other fields."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, (other, content) in enumerate(read_tar(data).items()):
            info = tarfile.TarInfo(other if number else name)
            info.size = len(content)
            if not number:
                for field, value in fields.items():
                    setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


HOSTILE = {
    "parent": dict(name=f"../{WNIDS[0]}_0.JPEG"),
    "deep parent": dict(name="a/../../../evil.JPEG"),
    "absolute": dict(name="/tmp/evil.JPEG"),
    "folder": dict(name="other/evil.JPEG"),
    "hidden": dict(name=".evil.JPEG"),
    "no image": dict(name="evil.sh"),
    "symlink": dict(name="n00000009_0.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0),
    "hardlink": dict(name="n00000009_0.JPEG", type=tarfile.LNKTYPE, linkname="/etc/passwd", size=0),
    "device": dict(name="n00000009_0.JPEG", type=tarfile.BLKTYPE, size=0),
    "sparse": dict(name="n00000009_0.JPEG", pax_headers={"GNU.sparse.size": str(2**40), "GNU.sparse.map": "0,1"}),
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_members_are_refused_and_nothing_is_written(spoiled, prepare, tmp_path, fields):
    replace_in_train(spoiled, lambda data: with_first(data, **fields))
    write_sums(spoiled)
    before = set(tmp_path.rglob("*"))
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2, printed
    assert tells(printed, str(spoiled / TRAIN))
    new = {path.name for path in set(tmp_path.rglob("*")) - before}
    assert new == {"root", prepare_imagenet.RECORD, prepare_imagenet.LOCK}


def test_class_tars_and_val_images_are_looked_at_too(spoiled, prepare, tmp_path):
    content = read_tar((spoiled / TRAIN).read_bytes())
    (spoiled / TRAIN).write_bytes(tar_of([(f"../{name}", data) for name, data in content.items()]))
    write_sums(spoiled)
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, str(spoiled / TRAIN))
    assert "../" in printed
    (spoiled / TRAIN).write_bytes(tar_of(content.items()))
    (spoiled / VAL).write_bytes(with_first((spoiled / VAL).read_bytes(), "../evil.JPEG"))
    write_sums(spoiled)
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, str(spoiled / VAL))
    assert "../evil.JPEG" in printed


def test_a_member_that_reaches_beyond_its_class_is_refused(spoiled, prepare, tmp_path):
    """The inner tar's last member claims bytes of the next class."""

    def reach(data):
        data = bytearray(data)
        names = list(read_tar(bytes(data)))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            info = archive.getmember(names[-1])
        info.size = len(data)
        data[info.offset : info.offset + 512] = info.tobuf(tarfile.USTAR_FORMAT)
        return bytes(data)

    replace_in_train(spoiled, reach)
    write_sums(spoiled)
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, str(spoiled / TRAIN))


@pytest.mark.parametrize("bomb", ["a huge member", "many members"])
def test_a_devkit_that_unpacks_to_too_much_is_refused_early(spoiled, prepare, tmp_path, bomb):
    count, size = (1, 10**12) if bomb == "a huge member" else (20_000, 0)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for number in range(count):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = size
            archive.fileobj.write(info.tobuf())
    (spoiled / DEVKIT).write_bytes(buffer.getvalue())
    write_sums(spoiled)
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, str(spoiled / DEVKIT))


def test_a_devkit_with_a_header_that_cannot_be_read_is_refused(spoiled, prepare, tmp_path):
    headers = {"GNU.sparse.size": "1", "GNU.sparse.map": "zero,one"}
    (spoiled / DEVKIT).write_bytes(tar_of([("meta.mat", b"x")], "w:gz", pax_headers=headers))
    write_sums(spoiled)
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, f"{DEVKIT}")


@pytest.mark.parametrize("archive", [TRAIN, VAL, DEVKIT])
def test_a_changed_bit_is_found_by_the_sum(spoiled, prepare, tmp_path, archive):
    data = bytearray((spoiled / archive).read_bytes())
    data[len(data) // 2] ^= 1
    (spoiled / archive).write_bytes(data)
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, f"{archive}", "MD5", f"{hashlib.md5(data).hexdigest()}")
    assert not (tmp_path / "root" / "train").exists()


@pytest.mark.run
def test_the_official_sums_are_the_default(archives, prepare, tmp_path, monkeypatch):
    done = run_command("scripts/data/prepare_imagenet.py", str(archives), str(tmp_path / "root"))
    assert done.returncode == 2
    assert tells(done.stderr, "1d675b47d978889d74fa0da5fadfb00e")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("counts", "val_ids", "facts"),
    [
        ((5, 8, 6, 7, 5, 10), VAL_IDS, ["n00000001.tar", "9", "10"]),
        (COUNTS, VAL_IDS[1:], ["12", "11"]),
        (COUNTS, (*VAL_IDS[1:], 7), ["KeyError", "7"]),
    ],
)
def test_wrong_counts_are_refused(spoiled, prepare, tmp_path, counts, val_ids, facts):
    write_devkit(spoiled, counts, val_ids)
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, *facts)


def test_a_missing_class_or_archive_is_named(spoiled, prepare, tmp_path):
    content = read_tar((spoiled / TRAIN).read_bytes())
    del content["n00000005.tar"]
    (spoiled / TRAIN).write_bytes(tar_of(content.items()))
    write_sums(spoiled)
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, "5", "classes", "6", "n00000005")
    (spoiled / VAL).unlink()
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, str(spoiled), VAL)


@pytest.mark.parametrize("content", [b"", b"not an archive" * 1000])
@pytest.mark.parametrize("archive", [TRAIN, VAL, DEVKIT])
def test_what_is_no_archive_is_named(spoiled, prepare, tmp_path, archive, content):
    (spoiled / archive).write_bytes(content)
    write_sums(spoiled)
    status, printed = prepare(spoiled, tmp_path / "root")
    assert status == 2
    assert tells(printed, f"{archive}")


def test_a_full_or_closed_folder_is_said_so(archives, prepare, tmp_path):
    assert prepare(archives, tmp_path, "--layout", "list")[0] == 0
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").write_bytes(b"in the way")
    status, printed = prepare(archives, tmp_path, "--layout", "list")
    assert status == 2
    assert tells(printed, str(tmp_path / "val"))

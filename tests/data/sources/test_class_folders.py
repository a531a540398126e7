"""Listing and what is said about folders that are not as they should be."""

import os

import pytest

from contextual_cnn.data.sources.class_folders import open_class_folders
from contextual_cnn.errors import UserError


def make(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    return root


def test_classes_and_images_are_sorted_and_strangers_passed_over(tmp_path):
    make(
        tmp_path,
        "train/b/2.JPEG",
        "train/b/1.jpg",
        "train/a/x.png",
        "train/a/notes.txt",
        "train/.git/y.jpg",
        "train/a/._x.png",
    )
    folder = open_class_folders(tmp_path, "train")
    assert folder.classes == ("a", "b")
    assert folder.paths == ("train/a/x.png", "train/b/1.jpg", "train/b/2.JPEG")
    assert folder.targets.tolist() == [0, 1, 1]


def test_targets_refer_to_the_given_classes(tmp_path):
    make(tmp_path, "val/b/1.jpg", "val/a/1.jpg")
    assert open_class_folders(tmp_path, "val", ("b", "a")).targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"data\.root.*train"),
        (["n01440764/1.jpg"], r"data\.root.*train.*n01440764"),
        (["train/1.jpg", "train/2.jpg"], r"data\.root.*train"),
        (["train/a/1.jpg", "train/b/notes.txt"], r"train/b\b"),
    ],
)
def test_what_was_looked_for_and_found_is_said(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        open_class_folders(make(tmp_path, *files), "train")


def test_missing_root_and_other_classes(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        open_class_folders(tmp_path / "nowhere", "train")
    make(tmp_path, "val/a/1.jpg", "val/c/1.jpg")
    with pytest.raises(UserError, match=r"\bc\b.*missing.*\bb\b"):
        open_class_folders(tmp_path, "val", ("a", "b"))


def test_a_folders_name_is_made_printable_and_its_images_are_read(tmp_path):
    """Bytes that are not UTF-8, and control characters; the val split's classes are found by the same names."""
    for split in ("train", "val"):
        for name in (b"caf\xe9", b"a\nb\x1b[31m", "ü".encode()):
            folder = os.path.join(os.fsencode(tmp_path), split.encode(), name)
            os.makedirs(folder)
            with open(os.path.join(folder, b"\xff 1.jpg"), "wb") as file:
                file.write(name)
    train = open_class_folders(tmp_path, "train")
    val = open_class_folders(tmp_path, "val", train.classes)
    assert train.classes == (r"a\nb\x1b[31m", r"caf\xe9", "ü")
    assert [train.name(i) for i in range(2)] == [r"train/a\nb\x1b[31m/\xff 1.jpg", r"train/caf\xe9/\xff 1.jpg"]
    assert [val.read(i) for i in range(3)] == [b"a\nb\x1b[31m", b"caf\xe9", "ü".encode()]
    make(tmp_path, r"train/caf\xe9/1.jpg")
    with pytest.raises(UserError, match="class caf"):
        open_class_folders(tmp_path, "train")


def test_a_folders_name_cannot_forge_a_line_of_the_message(tmp_path):
    make(tmp_path, "val/a\x1b[31m\nerror: everything is fine/1.jpg", "other/x\nerror: forged.txt")
    for root in (tmp_path, tmp_path / "other"):
        with pytest.raises(UserError) as error:
            open_class_folders(root, "val", ("a",))
        assert str(error.value).isprintable() or str(error.value).replace("\n  fix: ", "").isprintable()
        assert len(str(error.value).splitlines()) == 2

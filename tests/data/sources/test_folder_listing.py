"""Which files of a folder are its images, with torchvision as the witness; and what is counted as not read."""

import os

import pytest
from torchvision.datasets import ImageFolder

from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.sources.class_folders import open_class_folders
from contextual_cnn.errors import UserError
from contextual_cnn.settings.data import DataSettings
from tests.data.sources.test_class_folders import make


def torchvisions(folder):
    """(path below the root, class) of each image, and the classes."""
    found = ImageFolder(folder)
    return [(os.path.relpath(path, folder.parent), target) for path, target in found.samples], found.classes


def ours(root):
    source = open_class_folders(root, "train")
    return list(zip(source.paths, source.targets.tolist(), strict=True)), list(source.classes)


def test_subfolders_are_read_as_torchvision_reads_them(tmp_path):
    """Also in its order: by the paths of the folders, in which - and . come before /."""
    names = [
        "9.jpg",
        "10.jpg",
        "z/1.png",
        "z/y/2.JPEG",
        "z-1/3.webp",
        "z.d/4.bmp",
        "a/5.tif",
        "a/b/c/d/6.TIFF",
        "7.ppm",
    ]
    make(tmp_path, *(f"train/{label}/{name}" for label in ("b", "a", "A", "a b") for name in names))
    make(tmp_path, "elsewhere/x.jpg", "elsewhere/deep/y.jpg", "train/a/notes.txt", "train/readme.md")
    (tmp_path / "train" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "c").symlink_to(tmp_path / "elsewhere")
    assert ours(tmp_path) == torchvisions(tmp_path / "train")
    assert len(ours(tmp_path)[0]) == 4 * 9 + 2 + 2


def test_loops_of_links_end_and_each_image_is_read_once(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/a/sub/2.jpg", "train/b/3.jpg")
    for link, target in (("a/again", "."), ("a/sub/up", ".."), ("a/A", "sub"), ("b/other", "../a"), ("b/all", "..")):
        (tmp_path / "train" / link).symlink_to(target)
    source = open_class_folders(tmp_path, "train")
    assert source.paths[:2] == ("train/a/1.jpg", "train/a/sub/2.jpg")
    assert source.targets.tolist()[:3] == [0, 0, 1]
    for label in ("a", "b"):
        of_label = {os.path.realpath(tmp_path / path) for path in source.paths if path.startswith(f"train/{label}/")}
        assert len(of_label) == sum(path.startswith(f"train/{label}/") for path in source.paths)
    assert source.not_read["link to a folder that is read already"] >= 3


def test_what_is_not_read_is_counted_by_its_kind_and_named_by_the_first_line(tmp_path, caplog):
    strangers = [f"IMG_{i}.HEIC" for i in range(5)] + ["b.avif", "x.gif", "y.gif", "sub/z.svg", "LICENSE", ".DS_Store"]
    for split in ("train", "val"):
        make(tmp_path, *(f"{split}/{label}/{i}.jpg" for label in "abc" for i in range(2)))
    make(tmp_path, *(f"train/a/{name}" for name in strangers), "train/flat.jpg", "val/c/q.heic", "train/.git/x.gif")
    (tmp_path / "train" / "__MACOSX" / "a").mkdir(parents=True)
    data = ImageData(DataSettings(root=str(tmp_path)))
    assert data.sources["train"].not_read == {
        ".heic": 5,
        ".gif": 2,
        ".avif": 1,
        ".svg": 1,
        "without an ending": 1,
        ".jpg beside the class folders": 1,
        "__MACOSX beside the class folders": 1,
    }
    assert data.classes == ("a", "b", "c")
    with caplog.at_level("INFO", "contextual_cnn"):
        data.log_summary()
    first = caplog.records[0].getMessage()
    assert "6 .heic, 2 .gif" in first
    part = data.sources["train"].take([1, 2])
    assert part.not_read == data.sources["train"].not_read
    caplog.clear()
    with caplog.at_level("INFO", "contextual_cnn"):
        ImageData(DataSettings(root=str(tmp_path), exclude=None), ("val",), ("a", "b", "c")).log_summary()
    assert "1 .heic" in caplog.records[0].getMessage()


def test_benchmark_folders_are_read_alike(tmp_path):
    make(tmp_path, "b/1.jpg", "b/sub/2.jpg", "b/3.heic", "a/4.jpg", "README.txt", "__MACOSX/a/._4.jpg")
    source = ImageData(DataSettings(root=str(tmp_path), layout="benchmark"), ("val",), ("a", "b", "c")).sources["val"]
    assert source.paths == ("a/4.jpg", "b/1.jpg", "b/sub/2.jpg")
    assert source.not_read == {".heic": 1, ".txt beside the class folders": 1, "__MACOSX beside the class folders": 1}


def test_links_and_pipes_among_the_images_are_counted_and_not_opened(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    folder = tmp_path / "train" / "a"
    (folder / "itself.JPEG").symlink_to("itself.JPEG")
    (folder / "itself").symlink_to("itself")
    (folder / "nowhere.jpg").symlink_to("/nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "one.jpg").symlink_to("1.jpg")
    source = open_class_folders(tmp_path, "train")
    assert source.paths == ("train/a/1.jpg", "train/a/one.jpg", "train/b/1.jpg")
    assert source.not_read == {
        ".jpeg that is not a file": 1,
        ".jpg that is not a file": 2,
        "without an ending": 1,
    }


def test_a_class_of_unread_files_only_is_told_by_their_endings(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.heic", "train/b/2.heic")
    with pytest.raises(UserError, match=r"\bb\b.*\b2 \.heic"):
        open_class_folders(tmp_path, "train")

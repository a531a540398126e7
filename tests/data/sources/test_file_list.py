"""Lists of files: what a line means, and which file and line a mistake is in."""

import tracemalloc

import pytest

from contextual_cnn.data.sources.file_list import open_file_list
from contextual_cnn.errors import UserError


def make(root, lines, classes=None, split="train"):
    (root / "img").mkdir(exist_ok=True)
    for name in ("a.jpg", "b c.jpg"):
        (root / "img" / name).write_bytes(b"x")
    (root / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
    if classes is not None:
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return root


def test_lines_are_path_and_class_in_the_lists_order(tmp_path):
    source = open_file_list(make(tmp_path, ["img/b c.jpg 1", "", "./img//a.jpg   0"], ["cat", "dog"]), "train")
    assert source.paths == ("img/b c.jpg", "img/a.jpg")
    assert source.targets.tolist() == [1, 0]
    assert source.classes == ("cat", "dog")
    assert source.read(1) == b"x"


def test_classes_without_names_are_numbered_and_val_may_lack_some(tmp_path):
    make(tmp_path, ["img/a.jpg 1", "img/b c.jpg 0"])
    train = open_file_list(make(tmp_path, ["img/a.jpg 1"], split="val"), "train")
    assert train.classes == ("0", "1")
    assert open_file_list(tmp_path, "val", train.classes).classes == ("0", "1")


@pytest.mark.parametrize(
    ("lines", "classes", "message"),
    [
        (["img/a.jpg 0", "img/b.jpg"], None, r"train\.txt.*\bline 2\b"),
        (["img/a.jpg cat"], None, "line 1"),
        (["img/a.jpg -1"], None, "line 1"),
        (["img/a.jpg 99999999999999999999"], None, "line 1"),
        (["img/a.jpg 0", "/etc/passwd 0"], None, "line 2.*'/etc/passwd'"),
        (["img/../../x.jpg 0"], None, r"line 1.*x\.jpg'"),
        (["img/\x1b[2Jx.jpg 0"], None, r"line 1.*x\.jpg'"),
        (["img/\0x.jpg 0"], None, r"line 1.*x\.jpg'"),
        (["img/gpj.\u202ex 0"], None, "line 1.*u202ex'"),
        (["img/a.jpg 0", "img/x.jpg 0", "./img/a.jpg 0"], None, r"line 3.*img/a\.jpg.*line 1\b"),
        (["img/a.jpg 2"], ["cat", "dog"], r"line 1.*class 2\b.*\b2 classes"),
        (["img/a.jpg 0", "img/b.jpg 2", "img/c.jpg 0"], None, r"\b1\b.*\b3 classes.*class 1\b"),
        (["img/a.jpg 0"], ["cat", "dog"], r"class 1\b.*\bdog\b"),
        (["img/a.jpg 0"], ["cat", ""], r"classes\.txt.*\bline 2\b"),
        (["img/a.jpg 0"], ["cat", "cat"], r"classes\.txt.*\bline 2\b.*\bcat\b"),
        (["img/a.jpg 0"], ["cat", "d\x1b[31mog"], r"classes\.txt.*\bline 2\b.*d\\x1b\[31mog"),
        (["img/a.jpg " + "9" * 5000], None, "line 1"),
        ([], None, r"train\.txt"),
        (["imgs/a.jpg 0"], None, r"train\.txt.*imgs/a\.jpg"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, lines, classes, message):
    with pytest.raises(UserError, match=message):
        open_file_list(make(tmp_path, lines, classes), "train")


def test_other_classes_than_the_models_are_refused(tmp_path):
    make(tmp_path, ["img/a.jpg 0"], ["dog", "cat"], split="val")
    with pytest.raises(UserError, match=r"\b2 classes.*\b2\b"):
        open_file_list(tmp_path, "val", ("cat", "dog"))


def test_a_list_that_is_no_text_is_refused(tmp_path):
    make(tmp_path, ["img/a.jpg 0"])
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"train\.txt"):
        open_file_list(tmp_path, "train")


@pytest.mark.parametrize(
    "text", ["\ufeffimg/a.jpg 0\r\nimg/b c.jpg 1\r\n", "img/a.jpg\t0\nimg/b c.jpg \t 1\n"], ids=["bom", "tab"]
)
def test_lists_of_windows_and_spreadsheets_are_read(tmp_path, text):
    make(tmp_path, [])
    (tmp_path / "train.txt").write_text(text)
    source = open_file_list(tmp_path, "train")
    assert source.paths == ("img/a.jpg", "img/b c.jpg")
    assert source.targets.tolist() == [0, 1]


@pytest.mark.parametrize("line", ["img/a.jpg,0", "img/b c.jpg,1", "img/a.jpg;0"])
def test_another_separator_is_named(tmp_path, line):
    with pytest.raises(UserError, match="line 1") as error:
        open_file_list(make(tmp_path, [line]), "train")
    assert (";" if ";" in line else ",") in error.value.fix
    assert "blank" in error.value.fix


def test_a_class_beyond_the_images_is_refused_before_it_takes_memory(tmp_path):
    make(tmp_path, ["img/a.jpg 0", "img/b c.jpg 3000000"])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="class 3000000"):
            open_file_list(tmp_path, "train")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(UserError, match="class 999999999"):
        open_file_list(make(tmp_path, ["img/a.jpg 999999999"]), "train")


@pytest.mark.parametrize("name", ["train.txt", "classes.txt"])
@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_what_is_not_a_file_is_refused_by_its_name(tmp_path, name, kind):
    make(tmp_path, ["img/a.jpg 0"])
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir() if kind == "folder" else (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=name):
        open_file_list(tmp_path, "train")

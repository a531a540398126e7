"""ImageNet's variants: class folders without splits, some of the classes, or numbers for names."""

import pytest

from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.sources import find_layout, open_source
from contextual_cnn.errors import UserError
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.tasks.image_classification import evaluation
from tests.data.sources.test_class_folders import make

CLASSES = tuple(f"n{number:02d}" for number in range(12))


def test_some_of_the_classes_by_name(tmp_path):
    make(tmp_path, "n07/b.jpg", "n07/a.jpg", "n03/x.jpg", "README.txt", ".git/x.jpg")
    assert find_layout(tmp_path, "val") == "benchmark"
    source = open_source(tmp_path, "val", "benchmark", CLASSES)
    assert [source.name(i) for i in range(3)] == ["n03/x.jpg", "n07/a.jpg", "n07/b.jpg"]
    assert source.targets.tolist() == [3, 7, 7]
    assert source.classes == CLASSES


def test_numbers_are_places_among_the_classes_not_places_among_the_sorted_names(tmp_path):
    make(tmp_path, *(f"{number}/x.jpg" for number in (0, 1, 2, 10, 11)))
    source = open_source(tmp_path, "val", "benchmark", CLASSES)
    assert source.targets.tolist() == [0, 1, 2, 10, 11]  # sorted as texts, 10 and 11 would come before 2
    assert source.name(3) == "10/x.jpg"


def test_names_that_are_the_trainings_are_no_numbers(tmp_path):
    make(tmp_path, "1/x.jpg", "10/x.jpg")
    assert open_source(tmp_path, "val", "benchmark", ("0", "1", "10")).targets.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        (["n03/x.jpg", "dog/x.jpg"], r"\b12 classes.*\bdog\b"),
        (["3/x.jpg", "12/x.jpg"], r"\b12 classes.*\b12, 3\b"),
        (["3/x.jpg", "03/x.jpg"], r"\b12 classes"),
        (["3/x.jpg", "n03/x.jpg"], r"\b12 classes.*\b3\b"),
        (["n03/notes.txt"], "n03"),
        (["x.jpg"], r"data\.root"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path, files, cause):
    with pytest.raises(UserError, match=cause):
        open_source(make(tmp_path, *files), "val", "benchmark", CLASSES)


def test_they_are_not_for_training(tmp_path):
    make(tmp_path, "n03/x.jpg")
    assert find_layout(tmp_path, "train") == "folders"
    with pytest.raises(UserError, match=r"data\.root"):
        open_source(tmp_path, "train", "benchmark", None)
    make(tmp_path / "incomplete", "train/n03/x.jpg")
    assert find_layout(tmp_path / "incomplete", "val") == "folders"


@pytest.mark.parametrize(("files", "numbered"), [(("n03/sub/x.jpg",), False), (("3/sub/x.jpg",), True)])
def test_evaluate_tells_numbers_from_names_also_in_subfolders(tmp_path, caplog, files, numbered):
    data = ImageData(DataSettings(root=str(make(tmp_path, *files)), layout="benchmark"), ("val",), CLASSES)
    with caplog.at_level("INFO", "contextual_cnn"):
        assert evaluation._classes_to_choose_from(data).tolist() == [number == 3 for number in range(12)]
    assert ("numbers" in caplog.text) == numbered

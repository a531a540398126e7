"""What timm's weights were trained on, beside what the data feed them."""

import pytest
import timm
import torch

from contextual_cnn.models.preprocessing import warn_of_other_pixels
from tests.conftest import small_run
from tests.helpers.overrides import CROPS_ALONE
from tests.helpers.quick_start import run
from tests.helpers.run_folders import write_run

IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], crop_pct=0.875, interpolation="bicubic")
OWN = dict(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], crop_pct=0.95, interpolation="bilinear")  # of test_resnet
OVERRIDES = ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.crop_pct=0.95", "data.interpolation=bilinear"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    return str(file)


@pytest.mark.parametrize(
    ("changed", "overrides"),
    [
        ({}, []),
        ({"interpolation": "bicubic"}, ["data.interpolation=bilinear"]),
        ({"crop_pct": 0.875}, ["data.crop_pct=0.95"]),
        (IMAGENET, OVERRIDES),
    ],
    ids=["the same", "interpolation", "crop", "all"],
)
def test_a_difference_is_named_with_the_overrides_that_mend_it(weights, changed, overrides, caplog):
    warn_of_other_pixels(timm.create_model("test_resnet"), weights, OWN | changed)
    assert len(caplog.records) == bool(overrides)
    assert [word for word in caplog.text.split() if word.startswith("data.")] == overrides
    for value in changed.values():
        assert str(value).replace(" ", "") in caplog.text


def test_without_weights_and_with_those_of_a_run_there_is_nothing_to_compare(tmp_path, caplog):
    write_run(tmp_path, "convnext_atto")
    model = timm.create_model("test_resnet")
    for given in (None, str(tmp_path), str(tmp_path / "checkpoints" / "best.pt")):
        warn_of_other_pixels(model, given, IMAGENET)
    assert not caplog.records


def test_a_crop_that_there_is_not_here_is_named_too(weights, caplog):
    model = timm.create_model("test_resnet")
    model.pretrained_cfg = model.pretrained_cfg | {"crop_mode": "squash"}
    warn_of_other_pixels(model, weights, OWN)
    assert "squash" in caplog.text


@pytest.mark.run
def test_train_warns_once_and_runs_on(weights, image_root, tmp_path):
    timms = ["model=timm", "model.name=test_resnet", f"model.weights={weights}", "trainer.max_steps=1", *CROPS_ALONE]
    arguments = [
        argument
        for argument in small_run(image_root, tmp_path, *timms)
        if not argument.startswith(("model=contextual", "model.layer", "model.drop"))
    ]
    status, printed = run(*arguments, output=tmp_path / "output", COLUMNS="400")
    assert status == 0, printed
    assert printed.count(" ".join(OVERRIDES)) == 1

"""Layer numbers are those of ConvNeXt's own detection code."""

import pytest
import timm
import torch

from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.models.mask_rcnn import Detector
from contextual_cnn.optim import build_optimizer, build_schedule
from contextual_cnn.optim.layer_decay import layer_numbers
from contextual_cnn.settings.detector import DetectorSettings
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings
from contextual_cnn.settings.schedule import ScheduleSettings

# get_num_layer_layer_wise of facebookresearch/ConvNeXt, object_detection/mmcv_custom, in timm's names
PUBLISHED = {
    "stem.0.weight": (0, 0),
    "stages.0.blocks.2.mlp.fc1.weight": (1, 1),
    "stages.1.downsample.1.weight": (2, 2),
    "stages.1.blocks.0.conv_dw.weight": (2, 2),
    "stages.2.downsample.0.bias": (3, 3),
    "stages.2.blocks.0.gamma": (3, 3),
    "stages.2.blocks.2.gamma": (3, 3),
    "stages.2.blocks.3.gamma": (4, 4),
    "stages.2.blocks.8.gamma": (5, 5),
    "stages.3.downsample.1.weight": (6, 12),
    "stages.3.blocks.2.conv_dw.bias": (6, 12),
    "head.fc.weight": (7, 13),
}


@pytest.mark.parametrize(("name", "column"), [("convnext_tiny", 0), ("convnext_small", 1)])
def test_the_numbers_are_published(name, column):
    with torch.device("meta"):
        model = timm.create_model(name)
    numbers = layer_numbers(model)
    by_name = dict(model.named_parameters())
    assert {key: numbers[by_name[key]] for key in PUBLISHED} == {key: of[column] for key, of in PUBLISHED.items()}
    if column:
        assert numbers[by_name["stages.2.blocks.26.gamma"]] == 11


def test_a_detectors_groups_have_their_factors_and_the_schedule_keeps_them():
    body = build_model(ModelSettings(name="contextual_convnext_tiny", num_classes=10, timm_options={"dims": [8] * 4}))
    model = Detector(body, 3, DetectorSettings(fpn_channels=8, head_width=8))
    settings = OptimizerSettings(lr=1e-4, layer_decay=0.95)
    optimizer = build_optimizer(model, settings, 16)
    schedule = build_schedule(
        optimizer,
        ScheduleSettings(
            name="multistep", epochs=36, warmup_epochs=0, warmup_steps=500, milestones=[27, 33], min_lr=0.0
        ),
        7330,
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert groups.keys() == trained
    factors = {
        "backbone.body.stem.0.weight": 0.95**7,
        "backbone.body.stages.3.blocks.1.mlp.fc2.weight": 0.95,
        "backbone.body.stages.1.blocks.0.conv_dw.weight_offset.out.weight": 0.95**5,
        "backbone.body.mergings.2.before.0.weight": 1.0,
        "backbone.fpn.inner_blocks.0.0.weight": 1.0,
        "roi_heads.mask_predictor.conv5_mask.weight": 1.0,
    }
    rates = {0: 0.0, 250: 0.5, 500: 1.0, 27 * 7330 - 1: 1.0, 27 * 7330: 0.1, 33 * 7330 - 1: 0.1, 33 * 7330: 0.01}
    for step, rate in rates.items():
        schedule.step_update(step)
        for name, factor in factors.items():
            assert groups[name]["lr"] == pytest.approx(1e-4 * rate * factor, rel=1e-4, abs=1e-12), (step, name)
    assert groups["backbone.norms.0.weight"]["weight_decay"] == 0
    assert groups["backbone.fpn.inner_blocks.0.0.weight"]["weight_decay"] == 0.05
    assert groups["backbone.fpn.inner_blocks.0.0.bias"]["weight_decay"] == 0


def test_other_backbones_have_no_such_layers():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.raises(UserError, match=r"optimizer\.layer_decay"):
        layer_numbers(model)

"""What is counted and drawn."""

from dataclasses import replace

import pytest
import timm
from PIL import Image

from contextual_cnn.analysis.comparison import describe_family
from contextual_cnn.analysis.cost import count_cost
from contextual_cnn.analysis.curves import plot_curves
from contextual_cnn.models import build_model
from contextual_cnn.settings.model import ModelSettings

SIZE = 64  # of images: their maps are a multiple of the last stage's, as those of 224 are


def of_images_of_64(published, classifier):
    """Multiply-adds of a plain model: those of its maps shrink with them, those of its classifier stay."""
    return (published - classifier) * (SIZE / 224) ** 2 + classifier


def test_the_plain_models_cost_is_the_published_one():
    cost = count_cost(timm.create_model("convnext_tiny"))
    assert cost.parameters == 28_589_128
    assert cost.macs == pytest.approx(4.456e9, rel=1e-3)  # timm's own count
    assert cost.interpolation == cost.per_batch == 0


def test_a_clip_costs_what_was_published():
    """TSM (Lin et al., ICCV 2019): 32.88 G and 24.3 M for 8 frames in ResNet-50, 400 classes."""
    plain, contextual = describe_family("resnet50", num_classes=400, frames=8)
    assert plain["macs"] == pytest.approx(32.88e9, rel=0.01)
    assert plain["parameters"] == pytest.approx(24.3e6, rel=0.01)
    assert 1 < contextual["vs_twin"] < 1.02
    image, _ = describe_family("resnet50", num_classes=400)
    assert plain["macs"] == 8 * image["macs"]


def test_a_contextual_model_costs_its_twin_plus_what_the_definition_adds():
    """By hand, for the tiny model: 5 contextual layers, each stage's projection, three mergings."""
    head = 768 * 1000
    model = build_model(ModelSettings(name="contextual_convnext_tiny", num_classes=1000))
    cost, plain = count_cost(model, SIZE), of_images_of_64(4.455e9, head)
    layers = [(192, 8), (384, 4), (384, 4), (384, 4), (768, 2)]
    taps, context = 49, 256
    samples = sum(channels * side**2 * taps for channels, side in layers)
    generators = sum(
        (channels + context) * (channels // 16)  # weight offsets: hidden
        + channels // 16 * channels * taps  # weight offsets: out
        + channels * 2 * taps * side**2  # sampling offsets: 1x1 convolution
        + context * 2 * taps  # its context part
        + 2 * taps * taps * side**2  # sampling offsets: depthwise convolution
        for channels, side in layers
    )
    stages = sum(channels**2 + channels * context + context * 1000 for channels in (96, 192, 384, 768))
    mergings = 3 * (1000 * 128 + 128 * context)  # share @ table, and the second FC
    assert cost.interpolation == 4 * samples
    assert cost.per_batch == 3 * 1000 * context * 128
    assert cost.macs == pytest.approx(plain - head + generators + stages + mergings, rel=1e-3)


def test_the_dense_form_costs_its_twin_plus_generators_and_one_thin_map():
    """By hand, for ResNet-50 with one contextual stage: three blocks of 512 channels, the first of stride 2."""
    settings = ModelSettings(name="contextual_resnet50", num_classes=1000, contextual_stages=[4])
    plain, deformable, weight, both = (
        count_cost(build_model(replace(settings, convolution=kind)), SIZE)
        for kind in ("plain", "deformable", "weight_offsets", "contextual")
    )
    assert plain.macs == pytest.approx(of_images_of_64(4.089e9, 2048 * 1000), rel=1e-3)
    samples = 3 * 512 * 2 * 2 * 9
    assert deformable.macs - plain.macs == 3 * 27 * 512 * 9 * 2 * 2
    assert deformable.interpolation == both.interpolation == 4 * samples
    sides = (4, 2, 2)  # of the maps that the 1x1 convolutions see
    sampling = sum(18 * (512 * side**2 + 256 + 9 * 2 * 2) for side in sides)
    assert both.macs - weight.macs == sampling
    assert weight.interpolation == 0


def test_a_stage_has_one_colour_in_both_panels(tmp_path):
    rows = [{"step": i, "train/loss": 2.0, "train/loss_stage3": 1.0, "val/recall_stage3": 80.0} for i in (1, 2)]
    plot_curves(rows, tmp_path / "curves.png", "run")
    with Image.open(tmp_path / "curves.png") as drawn:
        halves = (drawn.width // 2, drawn.height // 2)
        losses = drawn.convert("RGB").crop((halves[0], 0, drawn.width, halves[1]))
        recalls = drawn.convert("RGB").crop((0, halves[1], halves[0], drawn.height))
    colours = [{pixel for n, pixel in panel.getcolors(1 << 20) if n > 100} for panel in (losses, recalls)]
    lines = [{pixel for pixel in found if max(pixel) - min(pixel) > 60} for found in colours]
    assert lines[0] == lines[1] != set()


def test_curves_are_drawn_from_whatever_rows_there_are(tmp_path):
    rows = [
        {"step": 1, "train/loss": 2.0, "train/loss_stage1": 1.0, "train/lr": 0.1, "train/top1": 5.0},
        {"step": 2, "val/top1": 50.0, "val/recall_stage1": 80.0},
        {"step": 2, "train/loss": 1.0, "train/loss_stage1": 0.5, "train/lr": 0.2, "train/top1": 9.0},
    ]
    for name, some in (("all", rows), ("none", [])):
        plot_curves(some, tmp_path / f"{name}.png", "run")
    with Image.open(tmp_path / "all.png") as drawn, Image.open(tmp_path / "none.png") as empty:
        assert drawn.size == (1200, 780)
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > len(empty.convert("RGB").getcolors(1 << 20)) + 20

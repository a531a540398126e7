"""The figures say what is so: their numbers against computations by hand, their pictures against their inputs."""

import json
import os
import runpy

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from contextual_cnn.analysis.class_embeddings import (
    class_similarity,
    off_diagonal,
    plot_considered_classes,
    plot_similarity,
    project,
)
from contextual_cnn.analysis.context_spread import context_spread, plot_context_spread, spread_table
from contextual_cnn.analysis.grad_cam import grad_cam, last_convolution, plot_grad_cam
from contextual_cnn.analysis.images import ImageMaker, Images, find_images, readable_names, spread
from contextual_cnn.analysis.modulation import record_modulations
from contextual_cnn.analysis.recall import plot_recall, recall_curves
from contextual_cnn.analysis.sampling_points import ImageGrid, plot_sampling_points, sampling_points
from contextual_cnn.analysis.shortlists import plot_shortlists, rank, shown_classes
from contextual_cnn.analysis.weight_offsets import most_varied_channels, offset_sizes, plot_weight_offsets
from contextual_cnn.contracts import StagedScores
from contextual_cnn.data.sources import open_source
from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.models.contextual_conv import ContextualConv2d
from contextual_cnn.ops import contextual_conv2d
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.model import ModelSettings
from tests.conftest import ROOT, run_command, small_run, wake_up
from tests.helpers.overrides import CROPS_ALONE

CLASSES = [f"class {i}" for i in range(6)]
BACKBONES = ("contextual_convnext_atto", "contextual_resnet50")


@pytest.fixture(scope="module", params=BACKBONES)
def model(request):
    """With offsets, of which a fresh model has none."""
    torch.manual_seed(0)
    built = build_model(ModelSettings(name=request.param, num_classes=6)).eval()
    for layer in built.modules():
        if isinstance(layer, ContextualConv2d):
            nn.init.normal_(layer.weight_offset.out.weight, std=0.1)
            nn.init.normal_(layer.sampling_offset.out.weight, std=0.1)
    for name, parameter in built.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)  # timm starts them at 0, which leaves nothing to see
    return built


@pytest.fixture
def images(photos) -> Images:
    pixels = np.stack([photo[100:164, 200:264] for photo in photos])
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 128 - 1
    return Images(["a", "b"], pixels, inputs, [0, None])


def test_images_that_cannot_be_decoded_are_named(image_root, tmp_path):
    maker = ImageMaker(DataSettings(root="", image_size=32), torch.device("cpu"))
    name = os.fsdecode(b"caf\xe9\n.jpg")
    (tmp_path / name).write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"caf\\xe9\\n\.jpg"):
        maker.from_files([tmp_path / name], ["a"])
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / name).rename(tmp_path / "val" / "a" / name)
    with pytest.raises(UserError, match=r"val/a/caf\\xe9\\n\.jpg"):
        maker.from_source(open_source(tmp_path, "val", "folders"), [0])


def drawn(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def differ(one, other) -> bool:
    return one.shape != other.shape or (one != other).any()


def test_grad_cam_is_the_gradient_weighted_sum_by_hand():
    """A 1x1 convolution of two channels, then the mean: the gradients of a logit are its weights over the area."""
    conv, head = nn.Conv2d(1, 2, 1, bias=False), nn.Linear(2, 2, bias=False)
    conv.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    head.weight.data = torch.tensor([[3.0, 1.0], [0.0, 0.5]])
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    image = torch.tensor([[[[1.0, 2.0], [-1.0, 4.0]]]])
    cam = grad_cam(net, conv, image)
    # logits: the mean 1.5 of channel 1, -1.5 of channel 2 -> 3.0 and -0.75; map (3 x - x) / 4, its positive part
    assert cam.predicted.tolist() == [0]
    assert cam.scores.item() == pytest.approx(torch.tensor([3.0, -0.75]).softmax(0)[0].item())
    assert cam.maps.tolist() == [[[0.25, 0.5], [0.0, 1.0]]]


def test_the_last_convolution_is_no_generator_of_offsets_and_looks_around(model):
    layer = last_convolution(model, 4)
    names = {module: name for name, module in model.named_modules()}
    assert names[layer] in ("stages.3.blocks.1.conv_dw", "layer4.2.conv2")
    with pytest.raises(UserError, match="convolution"):
        last_convolution(nn.Linear(2, 2), 4)


def test_grad_cam_of_both_models_is_drawn_and_depends_on_the_image(model, images, tmp_path):
    pictures = []
    for name, inputs in (("one", images.inputs), ("other", -images.inputs)):
        cam = grad_cam(model, last_convolution(model, 3), inputs)
        assert cam.maps.shape == (2, 4, 4)
        peaks = cam.maps.amax(dim=(1, 2))
        assert set(peaks.tolist()) in ({1.0}, {0.0, 1.0})  # 0 where everything speaks against the class
        plot_grad_cam(images, {"a": cam, "b": cam}, CLASSES, 3, tmp_path / f"{name}.png")
        pictures.append(drawn(tmp_path / f"{name}.png"))
    assert differ(*pictures)


def test_similarity_is_the_cosine_by_hand(tmp_path):
    vectors = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-6.0, -8.0]])
    similarity = class_similarity(vectors)
    expected = torch.tensor([[1, 0.96, -1], [0.96, 1, -0.96], [-1, -0.96, 1]])
    torch.testing.assert_close(similarity, expected)
    assert off_diagonal(similarity).mean().item() == pytest.approx((0.96 - 1 - 0.96) / 3)
    for name, matrix in (("one", similarity), ("other", torch.eye(3) + 0.5)):
        plot_similarity({"a": matrix, "b": similarity}, tmp_path / f"{name}.png")
    assert differ(drawn(tmp_path / "one.png"), drawn(tmp_path / "other.png"))


def test_recall_curves_are_the_ranks_counted_one_by_one(tmp_path):
    logits = [torch.randn(40, 7) for _ in range(3)]
    logits[1][:, 3] = -torch.inf  # dropped by a stage
    labels = torch.randint(7, (40,))
    parts = [
        (StagedScores(tuple(stage[part] for stage in logits), (), (2, 3, 4)), labels[part])
        for part in (slice(25), slice(25, 40))
    ]
    curves = recall_curves(parts)
    assert list(curves) == [2, 3, 4]
    for stage, curve in zip(logits, curves.values(), strict=True):
        for m in range(1, 8):
            found = [
                labels[b].item() in stage[b].topk(m).indices.tolist() and stage[b, labels[b]] > -torch.inf
                for b in range(40)
            ]
            assert curve[m - 1].item() == pytest.approx(sum(found) / 40)
    assert curves[3][-1] < 1 == curves[2][-1]
    for name, lines in (("one", curves), ("other", {stage: curve.sqrt() for stage, curve in curves.items()})):
        plot_recall(lines, {2: 4, 3: 2}, "title", tmp_path / f"{name}.png")
    assert differ(drawn(tmp_path / "one.png"), drawn(tmp_path / "other.png"))


def test_a_score_that_is_no_number_is_no_hit():
    assert recall_curves([(StagedScores.of(torch.full((2, 3), torch.nan)), torch.tensor([0, 1]))])[4].max() == 0


def test_recorded_offsets_are_what_the_layers_used(model, images):
    """Each layer, called with the recorded offsets alone, gives what it gave."""
    seen, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, ContextualConv2d):
            handles.append(layer.register_forward_hook(lambda *call, n=name: seen.update({n: call[1:]})))
    modulations = record_modulations(model, images.inputs)
    for handle in handles:
        handle.remove()
    assert [m.name for m in modulations] == list(seen)
    for m in modulations:
        (x, _), output = seen[m.name]
        assert m.input_size == tuple(x.shape[2:])
        again = contextual_conv2d(
            x, m.layer.weight, m.layer.bias,
            weight_offset=m.weight_offset, sampling_offset=m.sampling_offset, **m.layer.geometry,
        )  # fmt: skip
        torch.testing.assert_close(again, output)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_a_map_position_stands_for_the_centre_of_what_it_sees(model):
    """The gradient of a position of the stem's convolution reaches pixels around the one that the grid tells."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    output = first(image)
    size = output.shape[-1]
    (gradient,) = torch.autograd.grad(output[0, :, 5, 3].sum(), image)
    rows, columns = (gradient[0].abs().sum(dim=(0, other)).nonzero().squeeze(1) for other in (2, 1))
    grid = ImageGrid(model, 64)
    assert grid.pixel(torch.tensor(5.0), size) == (rows[0] + rows[-1]) / 2
    assert grid.pixel(torch.tensor(3.0), size) == (columns[0] + columns[-1]) / 2


def test_sampling_points_are_the_grid_plus_the_offsets(model, images, tmp_path):
    modulations = record_modulations(model, images.inputs)
    for modulation in modulations:
        regular, moved = sampling_points(modulation, (1, 0))
        kernel, stride = modulation.layer.weight.shape[-1], modulation.layer.geometry["stride"]
        assert regular[kernel + 2].tolist() == [1 * stride + 1 - kernel // 2, 2 - kernel // 2]  # second row, third tap
        k = 5
        expected = regular[k] + modulation.sampling_offset[1, 2 * k : 2 * k + 2, 1, 0]
        torch.testing.assert_close(moved[1, k], expected)
    plot_sampling_points(model, images, modulations[:2], (32, 32), tmp_path / "one.png")
    plot_sampling_points(model, images, modulations[:2], (10, 40), tmp_path / "other.png")
    assert differ(drawn(tmp_path / "one.png"), drawn(tmp_path / "other.png"))


def test_weight_offsets_are_split_into_their_mean_and_the_differences(model, images, tmp_path):
    modulation = record_modulations(model, images.inputs)[-1]
    offset, kernel = modulation.weight_offset, modulation.static_kernel()
    sizes = offset_sizes(modulation)
    half = (offset[0] - offset[1]) / 2  # of two images
    assert sizes.between == pytest.approx((half.norm() / kernel.norm()).item(), rel=1e-4)
    assert sizes.mean == pytest.approx((((offset[0] + offset[1]) / 2).norm() / kernel.norm()).item(), rel=1e-4)
    chosen = most_varied_channels(offset, 3)
    assert chosen == half.square().sum(dim=(1, 2)).argsort(descending=True)[:3].tolist()
    plot_weight_offsets(images, modulation, tmp_path / "one.png")
    plot_weight_offsets(images, modulation._replace(weight_offset=offset.flip(0)), tmp_path / "other.png")
    assert differ(drawn(tmp_path / "one.png"), drawn(tmp_path / "other.png"))


def colourful(count):
    """(count, 3, 64, 64) that do not look alike, as noise would."""
    torch.manual_seed(1)
    return 2 * torch.randn(count, 3, 1, 1) + torch.randn(count, 3, 64, 64)


def spread_of(images, labels, sizes=(5, 3), **options):
    """Of a model with offsets, shown the images in batches of these sizes; and the model."""
    torch.manual_seed(0)
    settings = dict(name="contextual_convnext_atto", num_classes=20, class_counts=[9, 6, 1], layer_scale=1.0)
    model = wake_up(build_model(ModelSettings(**settings | options))).eval()
    return context_spread(model, zip(images.split(sizes), labels.split(sizes), strict=True)), model


def test_the_spread_of_contexts_and_offsets_is_that_of_all_images_at_once(tmp_path):
    images, labels = colourful(8), torch.tensor([0, 0, 0, 1, 1, 5, 5, 5])
    spreads, model = spread_of(images, labels)
    assert list(spreads) == [2, 3, 4]
    contexts = {}
    for stage, merging in model.mergings.items():
        merging.register_forward_hook(lambda *call, stage=int(stage): contexts.update({stage: call[2].double()}))
    modulations = record_modulations(model, images)
    for stage, found in spreads.items():
        around = contexts[stage] - contexts[stage].mean(dim=0)
        assert found.context == pytest.approx(
            (around.square().sum() / 8).sqrt().item() / contexts[stage].mean(dim=0).norm().item(), rel=1e-4
        )
        means = torch.stack([around[labels == label].mean(dim=0) for label in labels])
        assert found.between_classes == pytest.approx((means.square().sum() / around.square().sum()).item(), rel=1e-4)
        assert 0 < found.between_classes < 1
        layers = [m for m in modulations if m.name.startswith(f"stages.{stage - 1}.")]
        assert len(layers) == 1 + (stage == 3)
        varied = [(m.weight_offset - m.weight_offset.mean(dim=0)).square().sum().item() / 8 for m in layers]
        kernels = [m.static_kernel().square().sum().item() for m in layers]
        assert found.weight_offset == pytest.approx((sum(varied) / sum(kernels)) ** 0.5, rel=1e-4)
        moved = [(m.sampling_offset - m.sampling_offset.mean(dim=0)).square().flatten() for m in layers]
        assert found.sampling_offset == pytest.approx(torch.cat(moved).mean().sqrt().item(), rel=1e-4)
    assert spread_table(spreads, "title").row_count == 3
    for name, some in (("one", spreads), ("other", {2: spreads[2]._replace(sampling_offset=None)})):
        plot_context_spread(some, "title", tmp_path / f"{name}.png")
    assert differ(drawn(tmp_path / "one.png"), drawn(tmp_path / "other.png"))


def test_blind_contexts_have_no_spread_and_told_ones_are_of_the_classes():
    images, labels = colourful(8), torch.arange(8) % 2
    blind, _ = spread_of(images, labels, context_of="blind")
    assert [found.context for found in blind.values()] == pytest.approx([0.0] * 3, abs=1e-6)
    assert all(found.weight_offset > 0 for found in blind.values())  # of the features
    own, _ = spread_of(images, labels)
    told, _ = spread_of(images, labels, context_of="told")
    assert own[2].context > 1e-4
    assert min(found.context for found in told.values()) > 1e-4
    assert told[4].between_classes == pytest.approx(1.0)  # a shortlist of one class, the true one


def test_a_spread_is_of_what_there_is():
    images, labels = colourful(8), torch.arange(8) % 2
    spreads, _ = spread_of(images, labels, convolution="sampling_offsets", contextual_stages=[4])
    assert list(spreads) == [4]
    assert spreads[4].weight_offset is None
    assert spreads[4].sampling_offset > 0
    masked, _ = spread_of(images, labels, context_layers="released", mask=True)
    assert all(found.sampling_offset > 0 for found in masked.values())


def test_shortlists_and_embeddings_are_drawn_from_the_scores(images, tmp_path):
    """Of any model: its numbers are all that the figures see."""
    points = project(table := torch.randn(6, 8))
    assert points.shape == (6, 2)
    assert (points == project(table)).all()
    shortlists = tuple(torch.arange(6).repeat(2, 1)[:, :kept] for kept in (5, 3, 2))
    scores = StagedScores(tuple(torch.randn(2, 6) for _ in range(4)), shortlists, (1, 2, 3, 4))
    flipped = scores._replace(logits=tuple(-logits for logits in scores.logits))
    fewer = scores._replace(shortlists=tuple(shortlist[:, :1] for shortlist in scores.shortlists))
    for name, some in (("one", scores), ("other", flipped)):
        plot_shortlists(images, some, CLASSES, tmp_path / f"bars_{name}.png")
    for name, some in (("one", scores), ("other", fewer)):
        plot_considered_classes(points, images, some, CLASSES, tmp_path / f"points_{name}.png")
    for kind in ("bars", "points"):
        assert differ(drawn(tmp_path / f"{kind}_one.png"), drawn(tmp_path / f"{kind}_other.png"))


def test_a_true_class_far_down_takes_the_last_bar():
    logits = torch.tensor([0.1, 0.5, 0.4, 0.3, 0.2])
    assert shown_classes(logits, None, 3) == shown_classes(logits, 1, 3) == [1, 2, 3]
    assert shown_classes(logits, 0, 3) == [1, 2, 0]
    assert rank(logits, 0) == 5
    assert shown_classes(torch.tensor([0.1, -torch.inf, 0.2]), None, 3) == [2, 0]


def test_images_are_made_as_timm_evaluates(image_root):
    files = find_images([image_root / "val"], 5)
    assert len(files) == 5
    size = dict(crop_pct=0.8, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    made = ImageMaker(DataSettings(root="", image_size=48, **size), torch.device("cpu")).from_files(
        files, ["class_1", "class_0"]
    )
    transform = create_transform(48, **size)
    for path, tensor, label in zip(files, made.inputs, made.labels, strict=True):
        with Image.open(path) as image:
            torch.testing.assert_close(tensor, transform(image), atol=1e-5, rtol=0)
        assert label == {"class_0": 1, "class_1": 0}.get(path.parent.name)
    assert made.pixels.shape == (5, 48, 48, 3)


def test_chosen_images_are_spread_and_names_are_readable():
    assert spread(3, 4) == [0, 1, 2]
    assert spread(100, 4) == [12, 37, 62, 87]
    assert readable_names(["n01440764", "U+00C0", "dog"]) == ["tench", "À", "dog"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, image_root):
    """A contextual run and its plain twin, two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    few = ("trainer.max_steps=2", *CROPS_ALONE)
    for name in ("contextual", "plain"):
        model = ["model=convnext_atto", "model.layer_scale=0.1"] if name == "plain" else []
        arguments = small_run(image_root, folder, *few, f"run_name={name}", *model)
        arguments = [a for a in arguments if name == "contextual" or a != "model=contextual_convnext_atto"]
        done = run_command(*arguments)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.run
def test_the_script_draws_everything_into_the_runs_folder_and_to_wandb(runs, image_root):
    figures = ("gradcam", "embeddings", "similarity", "sampling", "weights", "shortlist", "context", "recall")
    done = run_command(
        "scripts/analysis/analyze.py", *figures, "--checkpoint", str(runs / "contextual"),
        "--twin", str(runs / "plain"), "--stage", "2", "--count", "2", "--device", "cpu", "--wandb",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in figures:
        picture = drawn(runs / "contextual" / "figures" / f"{name}.png")
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 30, name
    spreads = json.loads((runs / "contextual" / "figures" / "context.json").read_text())
    assert set(spreads["stages"]) == {"2", "3", "4"}
    assert spreads["stages"]["2"]["context"] > 0
    mirrored = list((runs / "contextual" / "wandb").glob("offline-run-*/files/media/images/figures/*.png"))
    assert len(mirrored) == len(figures)


@pytest.mark.run
@pytest.mark.parametrize(
    ("arguments", "explained"),
    [
        (["shortlist", "--checkpoint", "RUNS/plain"], "convnext_atto"),
        (["context", "--checkpoint", "RUNS/plain"], "convnext_atto"),
        (["similarity", "--checkpoint", "RUNS/contextual"], "--twin"),
        (["gradcam", "--checkpoint", "RUNS/contextual"], r"\b32 pixels\s.*--stage 3"),
        (
            ["gradcam", "--checkpoint", "RUNS/contextual", "--images", str(ROOT / "README.md")],
            r"README\.md",
        ),
        (["gradcam", "--checkpoint", "RUNS/contextual", "--images", "nowhere"], "nowhere"),
        (["sampling", "--checkpoint", "RUNS/contextual", "--point", "32", "0"], "--point 32 0"),
        (["weights", "--checkpoint", "RUNS/contextual", "--count", "1"], "--count 4"),
        (["weights", "--checkpoint", "RUNS/contextual", "--stage", "1"], "--stage.*2, 3, 4"),
        (
            ["recall", "--checkpoint", "RUNS/contextual", "--output", str(ROOT / "README.md")],
            r"README\.md.*\s.*--output",
        ),
    ],
)
def test_what_cannot_be_drawn_is_explained(runs, arguments, explained, monkeypatch):
    monkeypatch.setattr("sys.argv", ["analyze.py", *(argument.replace("RUNS", str(runs)) for argument in arguments)])
    with pytest.raises(UserError, match=explained):
        runpy.run_path(str(ROOT / "scripts" / "analysis" / "analyze.py"))["main"]()


@pytest.mark.run
def test_the_script_ends_with_cause_and_fix(tmp_path):
    done = run_command("scripts/analysis/analyze.py", "recall", "--checkpoint", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "fix:" in done.stderr

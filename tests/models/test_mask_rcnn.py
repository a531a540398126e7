"""The detector: plain weights change nothing, the context stays what it was, boxes stay exact."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torchvision.ops import roi_align

from contextual_cnn.analysis.cost import count_detector_cost
from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.models.contextual_model import ContextualModel
from contextual_cnn.models.detector import build_detector, check_strides
from contextual_cnn.models.mask_rcnn import AlignedPool, Detector
from contextual_cnn.models.valid_mean import ValidMean, ValidPart
from contextual_cnn.models.weights import checkpoint_filter_fn
from contextual_cnn.settings.detector import DetectorSettings
from contextual_cnn.settings.model import ModelSettings
from tests.helpers.small_models import small

SMALL = DetectorSettings(
    fpn_channels=16, head_width=32, anchor_size=16, rpn_samples=32, roi_samples=16, proposals=50, score=0.0
)
SIZES = [(64, 96), (50, 90)]


def body(name, **options):
    torch.manual_seed(0)
    return build_model(ModelSettings(name=name, num_classes=20, timm_options=small(name), **options))


def detector(name="contextual_convnext_atto", settings=SMALL, **options):
    model = body(name, **options)
    torch.manual_seed(1)
    return Detector(model, 5, settings)


def batch():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    images[1, :, 50:], images[1, :, :, 90:] = 0, 0
    mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[:, 10:40, 10:50] = 1
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": mask[:0]}
    something = {"boxes": torch.tensor([[10.0, 10, 50, 40]]), "labels": torch.tensor([2]), "masks": mask}
    return images, SIZES, [something, nothing]


def losses(model):
    torch.manual_seed(3)  # which anchors and proposals the losses are of
    return model(*batch())


@pytest.mark.parametrize("name", ["convnext_atto", "resnet50"])
def test_plain_weights_give_the_very_same_detections(name):
    plain, contextual = body(name), body(f"contextual_{name}")
    contextual.load_state_dict(checkpoint_filter_fn(plain.state_dict(), contextual))
    found = []
    for model in (plain, contextual):
        torch.manual_seed(1)
        model = Detector(model, 5, SMALL).eval()
        images, sizes, _ = batch()
        with torch.no_grad():
            found.append(model(images, sizes))
    for one, other in zip(*found, strict=True):
        assert len(one["boxes"])
        for key in ("boxes", "labels", "scores", "masks"):
            assert torch.equal(one[key], other[key])


@pytest.mark.parametrize("context", ["frozen", "embeddings"])
def test_what_nothing_teaches_stays_as_it_was(context):
    """Also under weight decay; and all that is trained has a gradient, with an image in which nothing is."""
    model = detector(settings=replace(SMALL, context=context)).train()
    for parameter in model.body.parameters():  # offsets that are zero pass no gradient to the context
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses(model).values()).backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    fixed = {name for name in before if ".projections." in name or "temperature" in name}
    assert len(fixed) > 10
    assert not changed & fixed
    assert not any("running_" in name or "num_batches" in name for name in changed)
    assert ("backbone.body.class_embeddings.weight" in changed) == (context == "embeddings")
    assert any(".mergings." in name for name in changed)
    assert any(".weight_offset." in name for name in changed)


def multilabel_detector(**options):
    torch.manual_seed(0)
    settings = ModelSettings(
        name="contextual_convnext_atto", timm_options=small("convnext_atto"), **{"num_classes": 5} | options
    )
    return build_detector(settings, replace(SMALL, context="multilabel"), 5)


def test_a_context_that_is_taught_learns_which_classes_an_image_has():
    model = multilabel_detector().train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    images, _, targets = batch()
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        found = losses(model)
        seen.append(float(found["loss_context"].detach()))
        sum(found.values()).backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
        optimizer.step()
    assert seen[-1] < seen[0] / 2
    with torch.no_grad():
        _, logits = model.body.forward_staged_maps(images)
    assert all(int(of_stage[0].argmax()) == int(targets[0]["labels"][0]) - 1 for of_stage in logits)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"backbone.body.class_embeddings.weight", "backbone.body.projections.1.2.weight"} <= changed
    assert not any("running_" in name for name in changed)
    found = model.eval()(images, SIZES)
    assert "boxes" in found[0]


def test_the_loss_of_the_context_is_the_mean_of_every_stages_own():
    model = multilabel_detector().train()
    images, sizes, _ = batch()
    model._valid.tell(sizes, images.shape[2:])
    _, logits = model.body.forward_staged_maps(images)
    present = torch.tensor([[0.0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    by_hand = 0.0
    for of_stage in logits:
        probabilities = of_stage.sigmoid()
        by_hand -= (present * probabilities.log() + (1 - present) * (1 - probabilities).log()).mean()
    assert losses(model)["loss_context"].item() == pytest.approx(0.15 * float(by_hand.detach()), rel=1e-5)


def test_what_cannot_be_taught_is_refused():
    with pytest.raises(UserError, match="is of the 5 classes"):
        multilabel_detector(num_classes=20)
    with pytest.raises(UserError, match="several"):
        multilabel_detector(selection="reduce")
    with pytest.raises(UserError, match="no context"):
        build_detector(ModelSettings(name="convnext_atto"), replace(SMALL, context="multilabel"), 5)


def test_a_backbone_with_other_strides_is_refused():
    options = small("resnet50") | {"output_stride": 16}
    model = build_model(ModelSettings(name="contextual_resnet50", num_classes=20, timm_options=options))
    with pytest.raises(UserError, match=r"strides \[4, 8, 16, 16\]"):
        check_strides(Detector(model, 5, SMALL))
    check_strides(detector("contextual_resnet50"))


def test_batch_norms_keep_their_statistics_and_the_rest_trains():
    model = detector("contextual_resnet50")
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(norm.is_frozen for norm in norms)
    assert model.training
    assert model.roi_heads.training
    assert model.eval().train().roi_heads.training


def test_boxes_stay_exact_under_bfloat16():
    """torchvision's own become bfloat16, which makes 1200 of 1203."""
    model = detector().eval()
    images, sizes, _ = batch()
    for parameter in model.rpn.parameters():  # the same boxes whatever the precision of the features
        nn.init.zeros_(parameter)
    nn.init.zeros_(model.roi_heads.box_predictor.bbox_pred.weight)
    nn.init.constant_(model.roi_heads.box_predictor.bbox_pred.bias, 0.37)
    proposals = []
    model.rpn.register_forward_hook(lambda module, inputs, output: proposals.append(output[0]))
    with torch.no_grad():
        model(images, sizes)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(images, sizes)
    for exact, ours in zip(*proposals, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(exact, ours)
    for of in found:
        assert {of[key].dtype for key in ("boxes", "scores", "masks")} == {torch.float32}
        assert ((of["boxes"] - of["boxes"].bfloat16().float()).abs() > 0.1).any()
    with torch.autocast("cpu", torch.bfloat16):
        values = model.train()(*batch()).values()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in values)


def test_pooling_is_aligned_and_from_the_level_of_a_boxs_size():
    maps = {str(level): torch.randn(2, 3, 64 // 2**level, 64 // 2**level) for level in range(4)}
    boxes = [torch.tensor([[3.0, 5, 40, 30], [0, 0, 250, 240]]), torch.tensor([[8.0, 8, 120, 130]])]
    pooled = AlignedPool(list(maps), 7, 0)(maps, boxes, [(256, 256)] * 2)
    for row, (image, level, box) in enumerate([(0, 0, boxes[0][0]), (0, 2, boxes[0][1]), (1, 1, boxes[1][0])]):
        roi = torch.cat([torch.tensor([float(image)]), box])[None]
        expected = roi_align(maps[str(level)], roi, 7, 2.0 ** -(2 + level), 0, aligned=True)
        assert torch.equal(pooled[row], expected[0])


def test_no_boxes_at_all_pool_to_nothing():
    maps = {str(level): torch.randn(1, 3, 8, 8) for level in range(4)}
    assert AlignedPool(list(maps), 7, 0)(maps, [torch.zeros(0, 4)], [(32, 32)]).shape == (0, 3, 7, 7)


@pytest.mark.parametrize("name", ["contextual_convnext_atto", "convnext_atto", "contextual_resnet50"])
def test_the_head_of_the_classifier_is_gone(name):
    model = detector(name)
    maps = model.backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps.values()] == [
        (1, 16, 16, 24), (1, 16, 8, 12), (1, 16, 4, 6), (1, 16, 2, 3), (1, 16, 1, 2),
    ]  # fmt: skip
    names = set(dict(model.named_parameters()))
    assert not any(name.startswith(("backbone.body.head", "backbone.body.fc")) for name in names)
    assert ("backbone.body.class_embeddings.weight" in names) == isinstance(model.body, ContextualModel)
    assert not any(".projections.4." in name for name in names)


@pytest.mark.parametrize("name", ["contextual_convnext_atto", "contextual_resnet50"])
def test_the_pyramid_is_of_timms_features(name):
    features = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1), **small(name)).eval()
    model = build_model(ModelSettings(name=name, num_classes=1000, timm_options=small(name)))
    given = {key.removeprefix("model."): value for key, value in features.state_dict().items()}
    assert not model.load_state_dict(given, strict=False).unexpected_keys
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        ours = Detector(model, 5, SMALL).eval().backbone.maps(images)
        theirs = features(images)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_an_images_detections_do_not_depend_on_its_mates_in_a_plain_model_without_padding():
    model = detector("convnext_atto").eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        together = model(images, [(64, 96)] * 2)
        alone = [model(image[None], [(64, 96)])[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one["scores"], other["scores"], atol=1e-5)


def test_a_contextual_image_does_not_depend_on_a_mate_of_its_size():
    model = detector().eval()
    for parameter in model.body.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        together, alone = model.backbone(images), model.backbone(images[:1])
    for level, x in alone.items():
        assert torch.allclose(x, together[level][:1], atol=1e-5)


@pytest.mark.parametrize("name", ["convnext_atto", "contextual_convnext_atto", "contextual_resnet50"])
def test_padding_does_not_reach_what_lies_beyond_its_receptive_field(name):
    """An image by itself, and beside a wider one: means over padding would change all of it, from stage 2 on."""
    model = detector(name).eval()
    for parameter in model.body.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    alone = torch.randn(1, 3, 64, 512)
    beside = torch.zeros(2, 3, 64, 544)
    beside[:1, :, :, :512], beside[1:] = alone, torch.randn(1, 3, 64, 544)
    maps = []
    model.backbone.fpn.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]["1"][0]))
    with torch.no_grad():
        model(alone, [(64, 512)])
        model(beside, [(64, 512), (64, 544)])
        model(beside, [(64, 544), (64, 544)])  # as if the padding were the image
    by_itself, with_a_mate, padded = (x[:, :, :16] for x in maps)  # the left quarter
    scale = by_itself.abs().max()
    assert (by_itself - with_a_mate).abs().max() < 1e-5 * scale
    assert ((by_itself - padded).abs().max() > 1e-5 * scale) == name.startswith("contextual")


def test_a_valid_mean_is_the_mean_of_the_part():
    valid = ValidPart()
    x = torch.randn(2, 5, 8, 12, dtype=torch.float64)
    valid.tell([(64, 96), (64, 96)], (64, 96))
    assert torch.equal(ValidMean(valid)(x), x.mean(dim=(2, 3)))
    valid.tell([(64, 96), (33, 50)], (64, 96))
    mean = ValidMean(valid)(x)
    assert torch.allclose(mean[0], x[0].mean(dim=(1, 2)))
    assert torch.allclose(mean[1], x[1, :, :5, :7].mean(dim=(1, 2)))


def test_weights_of_a_classifier_and_of_a_detector_are_taken_over(tmp_path, caplog):
    settings = ModelSettings(name="contextual_convnext_atto", num_classes=20, timm_options=small("convnext_atto"))
    torch.save(body("contextual_convnext_atto").state_dict(), tmp_path / "classifier.pth")
    of_classifier = replace(settings, weights=str(tmp_path / "classifier.pth"))
    first = build_detector(of_classifier, SMALL, 5)
    given = torch.load(tmp_path / "classifier.pth")
    assert torch.equal(first.body.class_embeddings.weight, given["class_embeddings.weight"])
    torch.save(first.state_dict(), tmp_path / "detector.pth")
    of_detector = replace(settings, weights=str(tmp_path / "detector.pth"))
    other = build_detector(of_detector, SMALL, 3)  # of other classes: its predictors begin anew
    assert torch.equal(other.roi_heads.box_head.fc6.weight, first.roi_heads.box_head.fc6.weight)
    assert torch.equal(other.body.stem[0].weight, first.body.stem[0].weight)
    assert other.roi_heads.box_predictor.cls_score.out_features == 4
    with pytest.raises(UserError, match="other tensors"):
        build_detector(of_detector, replace(SMALL, head_width=48), 5)
    with pytest.raises(UserError, match=r"context of .* is of 20 classes"):
        build_detector(replace(of_classifier, num_classes=30), SMALL, 5)
    assert "random classes" not in caplog.text
    torch.save(body("convnext_atto").state_dict(), tmp_path / "plain.pth")
    build_detector(replace(settings, weights=str(tmp_path / "plain.pth")), SMALL, 5)
    assert "random classes" in caplog.text


@pytest.mark.parametrize(("name", "macs"), [("convnext_tiny", 262.0), ("contextual_convnext_tiny", 263.0)])
def test_a_detector_costs_what_is_published(name, macs):
    """262 G and 48 M at 1280 x 800 by ConvNeXt's authors, for Mask R-CNN with ConvNeXt-T."""
    model = build_detector(ModelSettings(name=name, num_classes=1000), DetectorSettings(), 80)
    cost = count_detector_cost(model)
    assert cost.macs / 1e9 == pytest.approx(macs, abs=0.5)
    if name == "convnext_tiny":
        assert cost.parameters / 1e6 == pytest.approx(48.1, abs=0.05)

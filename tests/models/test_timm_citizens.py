"""What timm's own tests ask of every model of its, of ours; and weights of every origin.

After the checklist of timm's tests/test_models.py: forward, backward, default cfg, features, intermediates, loading of
pretrained weights with other classes and channels. TorchScript is left out, torch.compile is in test_contextual_models.
"""

import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from timm.utils import accuracy
from torch.testing import assert_close

from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.models.class_context import check_class_counts
from contextual_cnn.settings.model import ModelSettings
from tests.conftest import wake_up
from tests.helpers.small_models import small

MODELS = ["contextual_convnext_atto", "contextual_resnet50"]
ALL = timm.list_models("contextual_*")
SIZE = 64


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def create(name, **options):
    return timm.create_model(name, **small(name), **options).eval()


def images(batch=1, channels=3):
    return torch.randn(batch, channels, SIZE, SIZE)


def test_all_sizes_are_registered():
    others = ("convnext_tiny", "convnext_small", "convnext_base", "resnet101")
    assert {*MODELS, *(f"contextual_{name}" for name in others)} == set(ALL)


@pytest.mark.parametrize("any_name", ALL)
def test_the_default_cfg_names_what_is_there(any_name):
    with torch.device("meta"):
        model = timm.create_model(any_name)
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg
    assert cfg["architecture"] == any_name
    assert f"{cfg['first_conv']}.weight" in model.state_dict()
    assert (model.num_classes, model.in_chans) == (cfg["num_classes"], cfg["input_size"][0])
    assert model.get_classifier().weight.shape == (1000, model.head_hidden_size)
    assert model.get_classifier().out_features == 1000
    side = cfg["input_size"][1] // model.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == (side, side)


def test_backward_reaches_every_parameter(name):
    model = wake_up(create(name, num_classes=42)).train()
    sum(logits.mean() for logits in model(images(2)).logits).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("selection", ["rerank", "reduce"])
def test_forward_is_features_then_head(name, selection):
    model, x = wake_up(create(name, num_classes=20, selection=selection)), images(2)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        kept = logits.isfinite()
        assert kept.all() == (selection == "rerank")
        assert_close(model.forward_head(features)[kept], logits[kept])
        assert features.shape == (2, model.num_features, SIZE // 32, SIZE // 32)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


def test_without_a_classifier_a_model_gives_its_pre_logits_or_its_map(name):
    model, x = wake_up(create(name, num_classes=20)), images()
    with torch.no_grad():
        features = model.forward_features(x)
        pre_logits = model.forward_head(features, pre_logits=True)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert isinstance(model.get_classifier(), torch.nn.Identity)
        assert_close(model(x), pre_logits)
        assert_close(model.train().eval()(x), pre_logits)
        model.reset_classifier(0, "")
        assert_close(model(x), features)


def test_new_classes_get_a_new_table_and_scaled_shortlists(name):
    model = create(name, num_classes=20, class_counts=(16, 8, 4))
    for classes, counts in ((40, (32, 16, 8)), (10, (8, 4, 2)), (4, (3, 2, 1)), (20, (15, 10, 5))):
        before = model.class_embeddings.weight
        model.reset_classifier(classes)
        assert model.num_classes == classes
        assert model.class_counts == counts
        assert model.class_embeddings.weight.shape == (classes, 256)
        assert model.class_embeddings.weight is not before
        assert model(images()).shape == (1, classes)
    model.reset_classifier(0)
    model.reset_classifier(6)
    assert model(images()).shape == (1, 6)


@pytest.mark.parametrize(("classes", "pool"), [(2, None), (10, ""), (10, "max"), (0, "max")])
def test_a_classifier_that_cannot_be_is_refused_and_changes_nothing(classes, pool):
    model, x = create("contextual_convnext_atto", num_classes=20), images()
    before = model(x)
    with pytest.raises(ValueError, match=r"classes|global_pool"):
        model.reset_classifier(classes, pool)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("classes", range(3, 30))
def test_scaled_class_counts_are_always_possible(classes):
    with torch.device("meta"):
        model = create("contextual_convnext_atto", num_classes=10, class_counts=(10, 9, 8))
    model.reset_classifier(classes)
    check_class_counts(classes, model.class_counts)


def test_features_only_gives_the_maps_of_the_whole_model(name):
    torch.manual_seed(1)
    model = wake_up(create(name, num_classes=20))
    torch.manual_seed(1)
    wake_up(extractor := create(name, num_classes=20, features_only=True))
    extractor.model.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        x = images(2)
        maps = extractor(x)
        last, whole = model.forward_intermediates(x)
    info = extractor.feature_info
    assert [m.shape[1] for m in maps] == info.channels()
    assert [SIZE // m.shape[2] for m in maps] == info.reduction()
    assert len(maps) >= 4
    for found, expected in zip(maps, whole, strict=True):
        assert_close(found, expected)
    assert_close(last, model.forward_features(x))


def test_fewer_features_need_fewer_modules(name):
    whole = create(name, features_only=True)
    for indices in ((1, 2), (0,), (2,)):
        model = create(name, features_only=True, out_indices=indices)
        assert [m.shape[1] for m in model(images())] == model.feature_info.channels()
        assert len(model.state_dict()) < len(whole.state_dict())
        last = model.feature_info.module_name()[-1]
        kept = int(last[-1]) + ("stages" in last) if last != "act1" else 0
        assert all(int(stage) < kept for stage in model.model.projections)
        assert all(int(stage) <= kept for stage in model.model.mergings)


def test_intermediates_are_chosen_by_index(name):
    model, x = create(name), images()
    last, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info)
    for indices, expected in ((1, maps[-1:]), ([0, 2], [maps[0], maps[2]]), ([-2], maps[-2:-1])):
        found = model.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
    assert_close(last, maps[-1])
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_the_ablations_without_context_have_features_too(name):
    model = create(name, convolution="deformable", features_only=True)
    assert [m.shape[1] for m in model(images())] == model.feature_info.channels()


@pytest.mark.parametrize("coarse", [False, True])
def test_parameters_are_grouped_from_the_stem_to_the_head(name, coarse):
    model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == set(dict(model.named_parameters()))
    last = max(groups.values())
    assert groups["class_embeddings.weight"] == groups["projections.4.5.weight"] == groups["mergings.2.before.0.weight"]
    assert groups["class_embeddings.weight"] == last
    assert groups[f"{model.pretrained_cfg['first_conv']}.weight"] == 0
    decayed = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
    spared = {id(p) for group in decayed if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(model.class_embeddings.weight), id(model.class_embeddings.log_inverse_temperature)} <= spared
    assert sum(len(group["params"]) for group in decayed) == len(list(model.parameters()))


def test_device_and_type_can_be_given():
    model = timm.create_model("contextual_convnext_atto", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_pretrained_weights_serve_other_classes_other_channels_and_features(tmp_path, name):
    """timm's loader, with a file of a trained contextual model."""
    trained = wake_up(create(name, num_classes=20))
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "model.safetensors"), num_classes=20))
    x = images()
    with torch.no_grad():
        assert_close(create(name, **given)(x), trained(x))
        other = create(name, num_classes=5, in_chans=1, **given)
        assert other(images(channels=1)).shape == (1, 5)
        assert_close(other.projections["4"][5].weight, trained.projections["4"][5].weight)
        extractor = create(name, features_only=True, **given)
        assert_close(extractor(x)[-1], trained.forward_features(x))
        trained.reset_classifier(0)
        assert_close(create(name, num_classes=0, context_classes=20, **given)(x), trained(x))
        with pytest.raises(ValueError, match="class_embeddings"):
            create(name, num_classes=0, **given)


def test_plain_weights_load_by_timms_loader(tmp_path, name):
    plain = create(name.removeprefix("contextual_"))
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = create(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "plain.pth")))
    x = images()
    expected = plain.forward_features(x)
    assert_close(model.forward_features(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def as_released(state, embedding_dim=256):
    """Our names -> those of the released ConvNeXt, with tensors of its shapes where it has other ones."""
    released = {}
    for key, value in state.items():
        for new, old in (
            ("stem.", "downsample_layers.0."),
            (".blocks.", "."),
            ("conv_dw.weight_offset.hidden.0", "dwconv.weight_offset_layer.0"),
            ("conv_dw.weight_offset.out", "dwconv.weight_offset_layer.3"),
            ("conv_dw.sampling_offset.from_features", "dwconv.spatial_offset_layer.0"),
            ("conv_dw.sampling_offset.out", "dwconv.spatial_offset_layer.3"),
            ("conv_dw.", "dwconv.conv."),
            ("mlp.fc", "pwconv"),
            ("class_embeddings.weight", "cls.class_token_embedding.weight"),
            ("class_embeddings.log_inverse_temperature", "cls.logit_scale"),
        ):
            key = key.replace(new, old)
        parts = key.split(".")
        if parts[2:3] == ["downsample"]:
            key = ".".join(["downsample_layers", parts[1], *parts[3:]])
        if parts[0] == "projections":
            key = ".".join(
                ["cls.visual_proj_heads", str(int(parts[1]) - 1), "nonlinear", str(int(parts[2]) - 2), parts[3]]
            )
        if parts[0] == "mergings":
            side = {"before": "in_nonlinear", "after": "out_nonlinear"}[parts[2]]
            key = ".".join(["cls.class_mergers", str(int(parts[1]) - 1), side, *parts[3:]])
        released[key] = value
    return {key: value for key, value in released.items() if "dwconv.conv.sampling" not in key}


def test_released_weights_load_as_far_as_they_have_a_counterpart(tmp_path, caplog):
    trained = wake_up(create("contextual_convnext_tiny", num_classes=20, projection_norm="layer"))
    kept = {key: value for key, value in trained.state_dict().items() if "offset.hidden.1" not in key}
    kept = {key: value for key, value in kept.items() if "offset.norm" not in key and "from_context" not in key}
    torch.save({"state_dict": as_released(kept)}, tmp_path / "released.pth")
    with caplog.at_level(logging.WARNING):
        given = dict(num_classes=20, weights=str(tmp_path / "released.pth"), timm_options=small("convnext_tiny"))
        given["name"] = "contextual_convnext_tiny"
        model = build_model(ModelSettings(**given, projection_norm="layer"))
    with pytest.raises(UserError, match=r"model\.projection_norm"):
        build_model(ModelSettings(**given))
    assert "spatial_offset_layer" in caplog.text
    found, given = model.state_dict(), trained.state_dict()
    for key in ("class_embeddings.", "projections.", "stem.", "stages.3.downsample", "stages.2.blocks.4.mlp"):
        some = [name for name in found if name.startswith(key)]
        assert some
        assert all(torch.equal(found[name], given[name]) for name in some)
    assert torch.equal(found["stages.1.blocks.0.conv_dw.weight"], given["stages.1.blocks.0.conv_dw.weight"])
    assert not found["stages.1.blocks.0.conv_dw.weight_offset.out.weight"].any()


def test_released_weights_of_another_embedding_size_are_refused(tmp_path):
    state = as_released(
        create("contextual_convnext_tiny", num_classes=20, embedding_dim=128, projection_norm="layer").state_dict()
    )
    torch.save(state, tmp_path / "released.pth")
    with pytest.raises(UserError, match=r"model\.weights.*released\.pth"):
        build_model(
            ModelSettings(
                name="contextual_convnext_tiny",
                num_classes=20,
                weights=str(tmp_path / "released.pth"),
                projection_norm="layer",
                timm_options=small("convnext_tiny"),
            )
        )


def test_timms_evaluation_works(image_root):
    """As timm's validate.py: dataset, loader and accuracy of its, on our model in eval mode."""
    model = wake_up(create("contextual_convnext_atto", num_classes=6))
    config = resolve_data_config({"input_size": (3, SIZE, SIZE)}, model=model)
    dataset = create_dataset("", root=str(image_root / "val"))
    loader = create_loader(dataset, batch_size=5, num_workers=0, use_prefetcher=False, **_of_the_loader(config))
    hits = total = 0.0
    with torch.no_grad():
        for batch, targets in loader:
            top1, top5 = accuracy(model(batch), targets, topk=(1, 5))
            hits, total = hits + top5.item() / 100 * len(batch), total + len(batch)
            assert top1 <= top5
    assert total == 18
    assert hits >= 6  # 5 of 6 classes


def _of_the_loader(config):
    return {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}

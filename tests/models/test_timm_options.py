"""A config may set the options of a backbone, whichever timm model it is. Those of the loader: tests/test_downloads."""

import inspect
import re
import sys

import pytest
import timm
from torch import nn

from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.models.timm_options import LARGEST, _options_of
from contextual_cnn.settings.model import ModelSettings


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "qkv_bias": False, "global_pool": "avg"}),
        ("resnet18", {"layers": [1, 1, 1, 1], "act_layer": "gelu", "output_stride": 16}),
        ("contextual_resnet50", {"layers": [1, 1, 1, 1], "base_width": 32}),
        ("resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [16, 32, 48, 64], "stem_type": "tiered"}),
        ("swin_tiny_patch4_window7_224", {"img_size": [64, 64], "window_size": 4, "depths": [1, 1, 1, 1]}),
    ],
)
def test_a_backbones_own_options_reach_it(name, options):
    plain = build_model(ModelSettings(name=name, num_classes=5)).state_dict()
    model = build_model(ModelSettings(name=name, num_classes=5, timm_options=options))
    assert {key: t.shape for key, t in model.state_dict().items()} != {key: t.shape for key, t in plain.items()}


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("patchsize", 2, "did you mean patch_size?"),
        ("embedding_dim", 64, "model.embedding_dim=64"),
        ("ls_init_value", 1.0, "model.layer_scale=1.0"),
        ("num_classes", 3, "model.num_classes=3"),
        ("patch_size", {"a": 1}, "leave it out"),
        ("patch_size", LARGEST + 1, "leave it out"),
        ("dims", [LARGEST, 1], "leave it out"),
        ("dims", [[[[1]]]], "leave it out"),
        ("norm_layer", "a/b", "leave it out"),
        ("norm_layer", "nothing", "null"),
    ],
)
def test_others_are_refused(key, value, part):
    with pytest.raises(UserError, match=key) as refused:
        build_model(ModelSettings(name="contextual_convnext_atto", num_classes=10, timm_options={key: value}))
    assert part in refused.value.fix


def test_no_option_of_any_timm_model_is_a_place():
    """A version of timm whose models take a path or an address would open a door: its name is looked at here first."""
    modules = [module for name, module in sys.modules.items() if name.startswith("timm.models")]
    kinds = {kind for module in modules for kind in vars(module).values() if inspect.isclass(kind)}
    models = [kind for kind in kinds if issubclass(kind, nn.Module) and hasattr(kind, "reset_classifier")]
    options = {name for kind in models for name in inspect.signature(kind.__init__).parameters}
    assert len(options) > 300
    place = re.compile(
        r"url|file|path(?!$)|folder|(^|_)dir($|_)|cache|hub|checkpoint|state|source|repo|pretrained|weights"
    )
    reviewed = {
        "pretrained_window_sizes",  # integers
        "use_checkpoint",  # of activations
        "state_dim",
        "drop_path_rate",
    }
    assert {name for name in options if place.search(name)} <= reviewed


def test_every_name_that_timm_lists_has_options_that_can_be_asked_for():
    for name in ("convnext_tiny", "efficientnet_b0", "mobilenetv3_small_050", "mixer_s32_224", "contextual_resnet50"):
        assert timm.is_model(name)
        assert _options_of(name)
        assert not {"pretrained", "pretrained_cfg", "cache_dir", "checkpoint_path", "features_only"} & _options_of(name)

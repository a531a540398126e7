"""The keys of conf/model/: an architecture and what may be changed about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from contextual_cnn.errors import UserError
from contextual_cnn.settings.keys import may_change

Convolution = Literal[
    "contextual",
    "weight_offsets",
    "sampling_offsets",
    "extra_input",
    "scale_shift",
    "without_prior",
    "deformable",
    "plain",
]
Norm = Literal["batch", "layer"]
Selection = Literal["rerank", "reduce"]
Merge = Literal["mean", "scores"]
ContextInit = Literal["uniform", "trunc_normal"]
ContextOf = Literal["shortlist", "clip", "told", "blind"]
ContextLayers = Literal["paper", "released"]

LARGEST = 2**16  # of a width, a depth, or a list of them in sum: no more than this is built


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A timm-registered model, initialised or from a file of weights.

    name: of an architecture that timm has, ours among them.
    num_classes: None takes the number from the data.
    drop_path_rate, layer_scale: stochastic depth and the initial layer scale; None leaves the model's default.
    weights: a .pth, .pt or .safetensors file, or a run folder. A contextual model takes those of its plain twin
        and then starts as an exact drop-in for it.
    depthwise: who computes plain depthwise convolutions of 5 x 5 taps or more on a GPU.
    class_counts to context_layers: contextual models only, see `ContextOptions`; None leaves the default.
    timm_options: what else the backbone's class takes by keyword, such as patch_size: see `check_timm_options`.
    """

    name: str
    num_classes: int | None = None
    drop_path_rate: float | None = None
    drop_rate: float = 0.0
    layer_scale: float | None = None
    grad_checkpointing: bool = may_change(False)
    depthwise: Literal["ours", "cudnn"] = may_change("ours")
    weights: str | None = None
    class_counts: Sequence[int] | None = None
    embedding_dim: int | None = None
    projection_norm: Norm | None = None
    context_norm: Norm | None = None
    context_init: ContextInit | None = None
    merge: Merge | None = None
    context_of: ContextOf | None = None
    selection: Selection | None = None
    contextual_stages: Sequence[int] | None = None
    contextual_every: int | None = None
    convolution: Convolution | None = None
    mask: bool | None = None
    generator_norm: Norm | None = None
    generator_width: int | None = None
    offset_bias: bool | None = None
    context_layers: ContextLayers | None = None
    timm_options: dict | None = None

    def __post_init__(self) -> None:
        for key, rate in (("drop_rate", self.drop_rate), ("drop_path_rate", self.drop_path_rate or 0.0)):
            if not 0 <= rate < 1:
                raise UserError(f"model.{key} must be at least 0 and below 1, got {rate}", f"model.{key}=0.1")
        for key in ("embedding_dim", "contextual_every", "generator_width"):
            size = getattr(self, key)
            if size is not None and not 1 <= size <= LARGEST:
                raise UserError(
                    f"model.{key} must be from 1 to {LARGEST}, got {size}", f"model.{key}=null is its default"
                )

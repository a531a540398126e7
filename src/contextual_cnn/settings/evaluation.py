"""The keys of conf/evaluate/: what is evaluated, and what is written of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from contextual_cnn.settings.trainer import Precision

# What may differ from the training's data
DATA_KEYS = (
    "root",
    "layout",
    "exclude",
    "limit",
    "image_size",
    "crop_pct",
    "interpolation",
    "mean",
    "std",
    "threads",
    "eval_batch_size",
    "loader",
    "on_bad_image",
)
SCENE_KEYS = ("short_side", "longest")  # of scenes: what may differ besides
CLIP_KEYS = ("sampling", "stride", "clips", "crops")  # of videos: what may differ

ContextControl = Literal["own", "swap", "mean", "zero"]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """checkpoint: a run folder, a .pt file, a folder of runs, or a pattern.

    weights: "auto" are those that made the checkpoint the best.
    context: also evaluates the model with other contexts than its images' own: those of other images, their mean,
        or zeros. context_stages: where; None is in all contextual stages.
    real_labels: ReaL's real.json, or None.
    predictions, per_class: CSV files to write, or None.
    data, clip: the values that differ from the training's.
    """

    checkpoint: str
    weights: Literal["auto", "raw", "ema"] = "auto"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Precision = "auto"
    context: ContextControl = "own"
    context_stages: Sequence[int] | None = None
    real_labels: str | None = None
    predictions: str | None = None
    per_class: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    clip: Mapping[str, Any] = field(default_factory=dict)

    def file(self, key: str) -> Path | None:
        """The path of real_labels, predictions or per_class."""
        given = getattr(self, key)
        return Path(given).expanduser() if given is not None else None

"""What export.py and predict.py share: the model of a checkpoint, with its classes and the images that it expects."""

from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageNetInfo
from torch import nn

from contextual_cnn import cli
from contextual_cnn.cli import Group
from contextual_cnn.data import ImageData
from contextual_cnn.engine.checkpoint import find_checkpoint, load_checkpoint
from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model

SCHEMA = {"model": Group(build_model), "data": Group(ImageData)}


@dataclass(frozen=True)
class CheckpointModel:
    """model: in eval mode, on the CPU. classes: their names. transform: what timm calls the data config."""

    path: Path
    weights: str
    model: nn.Module
    options: dict
    classes: tuple[str, ...]
    transform: dict

    @property
    def folder(self) -> Path:
        """The run's folder, or that of a checkpoint that lies elsewhere."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else self.path.parent


def load_checkpoint_model(given: str, weights: str = "auto") -> CheckpointModel:
    """
    Args:
        given: a run folder or a .pt file.
        weights: raw, ema, or auto: those that made the checkpoint the best.

    Raises:
        UserError: no checkpoint, one whose config is none of ours, or no such weights in it.
    """
    path = find_checkpoint(given)
    state = load_checkpoint(path)
    config = {key: state["config"][key] for key in SCHEMA}
    cli.check_config(config, SCHEMA)  # a checkpoint's config is somebody's input too
    weights = state["best"]["weights"] if weights == "auto" else weights
    if weights == "ema" and state["ema"] is None:
        raise UserError("--weights ema, but the checkpoint holds no moving average", "--weights raw")
    model = build_model(**config["model"] | {"weights": None})
    model.load_state_dict(state["model" if weights == "raw" else "ema"])
    data = config["data"]
    transform = {
        "input_size": (3, data["image_size"], data["image_size"]),
        "crop_pct": data["crop_pct"],
        "interpolation": "bicubic",
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
    }
    return CheckpointModel(path, weights, model.eval(), config["model"], tuple(state["classes"]), transform)


def describe_classes(classes: tuple[str, ...]) -> dict[str, str]:
    """Words for the classes that are named by ImageNet's synsets; the others are left out."""
    imagenet = ImageNetInfo().label_descriptions(as_dict=True)
    return {name: imagenet[name] for name in classes if name in imagenet}

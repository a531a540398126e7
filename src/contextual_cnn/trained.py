"""A trained model, read from a checkpoint: where evaluate.py and the scripts that use a trained model start from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from timm.data import ImageNetInfo
from torch import nn

from contextual_cnn.errors import UserError
from contextual_cnn.models.restore import restore_model
from contextual_cnn.runs.checkpoint import load_trained
from contextual_cnn.runs.checkpoint_entries import choose_weights, require_entries
from contextual_cnn.runs.checkpoint_files import find_checkpoint
from contextual_cnn.schema import Group, check_config
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.keys import LATER_KEYS, overridden
from contextual_cnn.settings.model import ModelSettings

_SCHEMA = {"model": Group(ModelSettings), "data": Group(DataSettings)}


@dataclass(frozen=True)
class Trained:
    """A model and what it was trained with.

    model: on the CPU, in eval mode.
    weights: "raw" or "ema".
    settings: of the model.
    data: of its training, with what the caller has overridden.
    own_data: as the training had it.
    config: of its training, as the checkpoint holds it; unchecked but for the groups above.
    """

    model: nn.Module
    weights: str
    path: Path
    step: int
    classes: tuple[str, ...]
    settings: ModelSettings
    data: DataSettings
    own_data: DataSettings
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The run's folder, or the folder of a checkpoint that lies elsewhere."""
        parent = self.path.parent
        return parent.parent if parent.name == "checkpoints" else parent

    @property
    def transform(self) -> dict[str, Any]:
        """How evaluation makes an image: the arguments of timm's `create_transform`, timm's data config."""
        return {
            "input_size": (3, self.data.image_size, self.data.image_size),
            "crop_pct": self.data.crop_pct,
            "interpolation": self.data.interpolation,
            "mean": tuple(self.data.mean),
            "std": tuple(self.data.std),
        }


def read_trained(checkpoint: str) -> tuple[Path, Mapping[str, Any], str]:
    """The file, what it holds, and the task that it was trained for.

    Args:
        checkpoint: a run folder or a .pt file.

    Raises:
        UserError: no such checkpoint, or a damaged one.
    """
    path = find_checkpoint(checkpoint)
    state = load_trained(path)
    require_entries(state, path, "config")
    return path, state, state["config"].get("task", LATER_KEYS["task"])


def load_model(checkpoint: str, weights: str = "auto", data: Mapping[str, Any] | None = None) -> Trained:
    """Builds the model of a checkpoint's own config and loads its weights.

    Args:
        checkpoint: a run folder or a .pt file.
        weights: "raw", "ema", or "auto" for those whose top-1 made the checkpoint the best, by its own record.
        data: what is to differ from the training's data.

    Raises:
        UserError: no such checkpoint, one of another task than images, a damaged one, one whose config is refused, or
            weights that it does not hold.
    """
    path, state, task = read_trained(checkpoint)
    if task != LATER_KEYS["task"]:
        raise UserError(
            f"{path} is of the task {task}, not of images", "python evaluate.py checkpoint=RUN takes any task"
        )
    return restore(path, state, weights, data)


def restore(
    path: Path, state: Mapping[str, Any], weights: str = "auto", data: Mapping[str, Any] | None = None
) -> Trained:
    """As `load_model`, of a file that has been read."""
    require_entries(state, path, "config", "classes", "best", "ema")
    name, tensors = choose_weights(state, weights)
    config = {**state["config"], "data": _with_later_keys(state["config"].get("data"))}
    try:
        _check_config(config, len(state["classes"]))
        settings, own_data = ModelSettings(**config["model"]), DataSettings(**config["data"])
        model = restore_model(settings, tensors)
    except UserError as error:  # of keys that are in the file
        raise UserError(
            f"{path}: {error.cause}", "use another checkpoint, or the version that wrote this one"
        ) from error
    return Trained(
        model=model.eval(),
        weights=name,
        path=path,
        step=state["step"],
        classes=tuple(state["classes"]),
        settings=settings,
        data=_evaluated_data(own_data, data or {}),
        own_data=own_data,
        config=config,
    )


def _with_later_keys(data: Any) -> Any:
    return LATER_KEYS["data"] | data if isinstance(data, dict) else data


def _check_config(config: Mapping[str, Any], classes: int) -> None:
    """A checkpoint's config is somebody's input too."""
    check_config({group: config.get(group) for group in _SCHEMA}, _SCHEMA)
    if config["model"]["num_classes"] != classes:
        raise UserError(f"a model of {config['model']['num_classes']} classes with the names of {classes}", "")


def _evaluated_data(own: DataSettings, overrides: Mapping[str, Any]) -> DataSettings:
    """A run's own data, but a loader of noise is never inherited, nor a layout of noise by a folder that is given."""
    real: dict[str, Any] = {}
    if own.loader == "synthetic":
        real["loader"] = "dali"
    if own.layout == "synthetic" and "root" in overrides:
        real["layout"] = "auto"
    return overridden(own, "data", real | dict(overrides))


def describe_classes(classes: tuple[str, ...]) -> dict[str, str]:
    """Words for the classes that are named by ImageNet's synsets; the others are left out."""
    imagenet = cast(dict[str, str], ImageNetInfo().label_descriptions(as_dict=True))
    return {name: imagenet[name] for name in classes if name in imagenet}

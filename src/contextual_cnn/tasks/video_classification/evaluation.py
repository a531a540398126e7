"""The evaluation of a checkpoint: its model is shown every video of a val split once, by one or more views of it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from contextual_cnn.data.video.video_data import VideoData
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.models.temporal_shift import fit_to_clips
from contextual_cnn.schema import Group, check_config
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.evaluation import EvaluationSettings
from contextual_cnn.tasks.image_classification.evaluation import evaluate_trained
from contextual_cnn.tasks.image_classification.tables import ranking
from contextual_cnn.tasks.video_classification.task import VideoEvaluation
from contextual_cnn.trained import Trained, restore

__all__ = ["evaluate_checkpoint", "ranking", "restore_videos"]


def evaluate_checkpoint(
    path: Path, state: Mapping[str, Any], settings: EvaluationSettings, world: World, console: Console
) -> dict[str, Any]:
    """The report of one checkpoint, complete on rank 0, where it is printed and written too.

    Args:
        state: what the file holds.
    """
    trained, own = restore_videos(path, state, settings.weights, settings.data)
    clip = replace(own, **settings.clip)
    data = VideoData(trained.data, clip, ("val",), trained.classes)
    views = {key: value for key, value in settings.clip.items() if value != getattr(own, key)}
    return evaluate_trained(trained, data, settings, world, console, of=VideoEvaluation, views=views)


def restore_videos(
    path: Path, state: Mapping[str, Any], weights: str = "auto", data: Mapping[str, Any] | None = None
) -> tuple[Trained, ClipSettings]:
    """A trained model of clips, and its training's clips.

    Raises:
        UserError: as `trained.restore`; of keys about clips too.
    """
    trained = restore(path, state, weights, data)
    try:
        found = trained.config.get("clip")
        check_config({"clip": found}, {"clip": Group(ClipSettings)})
        clip = ClipSettings(**cast(dict[str, Any], found))  # as the check has seen
        fit_to_clips(trained.model, clip)
    except UserError as error:  # of keys that are in the file
        raise UserError(f"{path}: {error.cause}", "use another checkpoint, or the version that wrote it") from error
    return trained, clip

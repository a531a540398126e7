"""What predict.py names: images, or the clips of videos. How a file is read, shown to the model, and its scores read.

Shapes: B files, V views of a video, T frames of a view, S side of the model's input, N classes, k of a shortlist.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor

from contextual_cnn.contracts import StagedScores
from contextual_cnn.data.image_check import FORMATS, open_image
from contextual_cnn.data.sources.folder_listing import VIDEO_FILES
from contextual_cnn.data.video.video_loader import evaluated_views, normalised
from contextual_cnn.models.contextual_model import staged_scores
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.tasks.video_classification.consensus import of_videos
from contextual_cnn.tasks.video_classification.evaluation import restore_videos
from contextual_cnn.trained import Trained, load_model, read_trained

# PIL's names of what is in such files. Training takes no GIF, for DALI decodes none; here it is the first picture
READ_AS = (*FORMATS, "GIF")
FIRST = 4  # classes of a shortlist that are named


class Shortlist(NamedTuple):
    """The classes that a stage handed on, likeliest first.

    size: how many it hands on. Of a video that is of each frame, and its frames may differ.
    frames: of a video, in how many frames each class was handed on, and how many frames there are.
    """

    stage: int
    classes: list[int]
    size: int
    frames: tuple[list[int], int] | None = None


class Prediction(NamedTuple):
    """top: (class, probability), likeliest first."""

    path: Path
    top: list[tuple[int, float]]
    shortlists: list[Shortlist]


class Subject(Protocol):
    """A kind of files, and a model that was trained for it."""

    noun: str
    article: str
    suffixes: Sequence[str]
    given: Trained

    def read(self, path: Path) -> Tensor:
        """What the model is shown of a file."""

    def scores(self, inputs: Tensor) -> StagedScores:
        """Of files that were read, stacked: logits (B, N)."""

    def shortlists(self, scores: StagedScores, i: int) -> list[Shortlist]:
        """Of file i."""

    def pictures(self, path: Path) -> np.ndarray:
        """(T, S, S, 3) in [0, 1]: what the model saw, to be looked at; of an image T is 1."""


def subject_of(checkpoint: str, weights: str) -> Subject:
    """What a run was trained for.

    Raises:
        UserError: no such checkpoint, or one that cannot be used.
    """
    path, state, task = read_trained(checkpoint)
    if task == "video_classification":
        return Videos(*restore_videos(path, state, weights))
    return Images(load_model(checkpoint, weights))


class Images:
    """Made as an evaluation makes them."""

    noun, article = "image", "an image"
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")

    def __init__(self, given: Trained) -> None:
        self.given = given

    @cached_property
    def _transform(self):
        return create_transform(**self.given.transform)

    def read(self, path: Path) -> Tensor:
        """(3, S, S)."""
        return self._transform(open_image(path.read_bytes(), READ_AS).convert("RGB"))

    def scores(self, inputs: Tensor) -> StagedScores:
        return staged_scores(self.given.model, inputs)

    def shortlists(self, scores: StagedScores, i: int) -> list[Shortlist]:
        """The model hands them on without an order."""
        found = []
        for stage, logits, shortlist in zip(scores.stages[:-1], scores.logits[:-1], scores.shortlists, strict=True):
            order = logits[i, shortlist[i]].argsort(descending=True)
            found.append(Shortlist(stage, shortlist[i, order].tolist(), shortlist.shape[1]))
        return found

    def pictures(self, path: Path) -> np.ndarray:
        to_pixels = create_transform(**self.given.transform | {"mean": (0, 0, 0), "std": (1, 1, 1)})
        image = open_image(path.read_bytes(), READ_AS).convert("RGB")
        return to_pixels(image).permute(1, 2, 0).clamp(0, 1).numpy()[None]


class Videos:
    """Clips and crops as the run's own evaluation takes them."""

    noun, article = "video", "a video"
    suffixes = VIDEO_FILES.extensions

    def __init__(self, given: Trained, clip: ClipSettings) -> None:
        self.given, self._clip = given, clip

    def read(self, path: Path) -> Tensor:
        """(V, T, 3, S, S)."""
        views = torch.from_numpy(self._views(path)).movedim(-1, 2)
        return normalised(views[None], self.given.data)[0]

    def scores(self, inputs: Tensor) -> StagedScores:
        def of_frames(frames: Tensor) -> StagedScores:
            return staged_scores(self.given.model, frames)

        return of_videos(of_frames)(inputs)

    def shortlists(self, scores: StagedScores, i: int) -> list[Shortlist]:
        """Classes by the frames that hand them on, then by the clip's score."""
        found = []
        for stage, logits, shortlist in zip(scores.stages[:-1], scores.logits[:-1], scores.shortlists, strict=True):
            frames, size = shortlist.shape[1:]
            counts = torch.bincount(shortlist[i].flatten(), minlength=logits.shape[1])
            order = sorted(range(len(counts)), key=lambda c: (-counts[c].item(), -logits[i, c].item()))
            held = [c for c in order if counts[c] > 0]
            found.append(Shortlist(stage, held, size, ([int(counts[c]) for c in held], frames)))
        return found

    def pictures(self, path: Path) -> np.ndarray:
        """Of the middle view."""
        views = self._views(path)
        return views[len(views) // 2] / np.float32(255)

    def _views(self, path: Path) -> np.ndarray:
        return evaluated_views(path.read_bytes(), self._clip, self.given.data)


def describe_shortlist(shortlist: Shortlist, names: Sequence[str]) -> str:
    shown = [names[i] for i in shortlist.classes[:FIRST]]
    share = ""
    if shortlist.frames is not None:
        counts, frames = shortlist.frames
        share = f" a frame, of {frames} frames"
        shown = [f"{name} ({count})" for name, count in zip(shown, counts, strict=False)]
    more = ", ..." if len(shortlist.classes) > FIRST else ""
    of_all = f"{shortlist.size} of {len(names)} classes{share}"
    return f"after stage {shortlist.stage}: {of_all}: {', '.join(shown)}{more}"

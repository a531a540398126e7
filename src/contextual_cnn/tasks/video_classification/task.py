"""Video classification as the training loop sees it (table 2): an image model with temporal shifts, fed with clips."""

from collections.abc import Iterator

from torch import nn

from contextual_cnn.contracts import Batch
from contextual_cnn.data.video.video_data import VideoData
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.models.temporal_shift import fit_to_clips
from contextual_cnn.task import Call, Measure, Outcome, Position
from contextual_cnn.tasks.image_classification.classification import Classification
from contextual_cnn.tasks.image_classification.measure import ClassificationEvaluation
from contextual_cnn.tasks.video_classification.consensus import of_videos
from contextual_cnn.tasks.video_classification.settings import VideoClassificationSettings


class VideoEvaluation:
    """The val split of some videos, as often as it is asked for."""

    def __init__(self, of_frames: ClassificationEvaluation) -> None:
        self._of_frames, self.samples, self.batches = of_frames, of_frames.samples, of_frames.batches

    def measure(self, model: nn.Module) -> "VideoMeasure":
        return VideoMeasure(self._of_frames.measure(model))


class VideoMeasure:
    """What is counted of images, counted of videos by their mean scores."""

    def __init__(self, of_images: Measure) -> None:
        self._of_images = of_images
        self.report = of_images.report

    def add(self, call: Call, batch: Batch) -> None:
        """Shows the model a batch: (B, V, T, 3, H, W)."""
        self._of_images.add(of_videos(call), batch)


class VideoClassification(Classification):
    """Staged scores of frames, averaged over each clip, and the staged loss of the averages."""

    settings: VideoClassificationSettings
    data: VideoData

    def build_model(self) -> nn.Module:
        """On the CPU.

        Raises:
            UserError: batch norms that are to keep what no weights bring.
        """
        if self.settings.clip.partial_bn and self.settings.model.weights is None:
            raise UserError(
                "clip.partial_bn=true keeps the batch norms of model.weights, and there are none",
                "model.weights=FILE, or clip.partial_bn=false",
            )
        model = build_model(self.settings.model)
        fit_to_clips(model, self.settings.clip)
        return model

    def batches(self, position: Position) -> Iterator[Batch]:
        """Clips (B, 1, T, 3, H, W) float32 and their classes (B,), from a position on."""
        return self.data.train_batches(position.plan, position.seed, position.world, position.step)

    def forward(self, call: Call, batch: Batch) -> Outcome:
        """The staged loss of the clips' mean scores, its parts, hits, and the recall of the frames' shortlists."""
        return super().forward(of_videos(call), batch)

    def evaluation(self, world: World) -> "VideoEvaluation":
        """Of the val split."""
        return VideoEvaluation(ClassificationEvaluation(self.data, world))

    def describe(self, model: nn.Module) -> str:
        """Name, size, classes, and the frames of a clip."""
        clip = self.settings.clip
        shift = f"1/{clip.shift_div} of the channels shifted" if clip.shift_div else "no shift"
        return f"{super().describe(model)}, {clip.frames} frames, {shift}"

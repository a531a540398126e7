"""Draws what a trained model looks at, and what the context does in it.

python scripts/analysis/analyze.py FIGURE... --checkpoint outputs/NAME [--twin outputs/NAME_PLAIN]
                                   [--images FILE_OR_FOLDER ...]

  gradcam     where the last convolution finds what speaks for the predicted class; beside it the plain twin (figure 4)
  embeddings  t-SNE of the class embeddings, and the classes that each stage considers for an image (figure 5a)
  similarity  similarity of the classes, of the model and of its plain twin (figure 5b)
  sampling    where the contextual layers look from one position of the image
  weights     how the contextual layers change their kernels from image to image
  shortlist   the best classes after each stage, and which of them stay
  context     how much contexts and offsets vary over the images of the val split, by stage; numbers in context.json too
  recall      how often the true class is among the best m after each stage, over the val split

Without --images the figures show images of the checkpoint's val split. A file's true class is known where its folder
is named for a class. docs/figures.md shows every figure.
"""

import argparse
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from contextual_cnn.analysis.class_embeddings import (
    class_similarity,
    off_diagonal,
    plot_considered_classes,
    plot_similarity,
    project,
)
from contextual_cnn.analysis.context_spread import context_spread, plot_context_spread, spread_table
from contextual_cnn.analysis.grad_cam import grad_cam, last_convolution, plot_grad_cam
from contextual_cnn.analysis.images import ImageMaker, Images, find_images, readable_names, spread
from contextual_cnn.analysis.modulation import Modulation, record_modulations
from contextual_cnn.analysis.recall import plot_recall, recall_curves
from contextual_cnn.analysis.sampling_points import plot_sampling_points
from contextual_cnn.analysis.shortlists import plot_shortlists
from contextual_cnn.analysis.weight_offsets import offset_sizes, plot_weight_offsets
from contextual_cnn.contracts import StagedScores
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.distributed import World, process_group
from contextual_cnn.errors import UserError, run_script
from contextual_cnn.models import ContextualModel
from contextual_cnn.models.contextual_model import staged_scores
from contextual_cnn.runs.wandb_logger import WandbLogger
from contextual_cnn.settings.logger import LoggerSettings
from contextual_cnn.trained import Trained, load_model


def main() -> None:
    arguments = parse_arguments()
    overrides = {"root": str(arguments.data_root)} if arguments.data_root else {}
    trained = load_model(arguments.checkpoint, arguments.weights, overrides)
    twin = load_model(arguments.twin, arguments.weights) if arguments.twin else None
    output = arguments.output or trained.folder / "figures"
    with process_group(arguments.device) as world:
        subject = Subject(trained, twin, arguments, world)
        for name in arguments.figures:
            path = output / f"{name}.png"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                FIGURES[name](subject, path)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}", "give --output FOLDER") from error
            print(path)
    if arguments.wandb:
        mirror(trained, {name: output / f"{name}.png" for name in arguments.figures})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="+", choices=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder, or a .pt file in it")
    parser.add_argument("--twin", metavar="RUN", help="the plain twin's")
    parser.add_argument("--weights", choices=["auto", "raw", "ema"], default="auto")
    parser.add_argument("--images", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--count", type=int, default=4, help="images at most, spread over those given (default: 4)")
    parser.add_argument(
        "--stage", type=int, choices=[1, 2, 3, 4], default=4, help="of gradcam and weights (default: 4)"
    )
    parser.add_argument(
        "--point", nargs=2, type=int, metavar=("ROW", "COLUMN"), help="pixel of sampling (default: the centre)"
    )
    parser.add_argument("--data-root", type=Path, metavar="FOLDER", help="where the data is now")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the PNG files (default: figures/ of the run)")
    parser.add_argument("--wandb", action="store_true", help="put the figures into the run on W&B too")
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"--count must be 1 or more, got {arguments.count}")
    return arguments


@dataclass
class Subject:
    """What the figures are drawn of; each part is made when a figure first needs it."""

    trained: Trained
    twin: Trained | None
    arguments: argparse.Namespace
    world: World

    @property
    def name(self) -> str:
        return self.trained.settings.name

    @cached_property
    def model(self) -> nn.Module:
        return self.trained.model.to(self.world.device)

    @cached_property
    def contextual(self) -> ContextualModel:
        if not isinstance(self.model, ContextualModel):
            raise UserError(
                f"this figure needs a contextual model, and {self.trained.path} holds {self.name} without context",
                "give a contextual run as --checkpoint, the plain one as --twin",
            )
        return self.model

    @cached_property
    def classes(self) -> list[str]:
        return readable_names(self.trained.classes)

    @cached_property
    def data(self) -> ImageData:
        return ImageData(self.trained.data, ("val",), self.trained.classes)

    @cached_property
    def images(self) -> Images:
        maker = ImageMaker(self.trained.data, self.world.device)
        if self.arguments.images:
            return maker.from_files(find_images(self.arguments.images, self.arguments.count), self.trained.classes)
        source = self.data.sources["val"]
        return maker.from_source(source, spread(len(source), self.arguments.count))

    @cached_property
    def scores(self) -> StagedScores:
        """Of the images, on the CPU."""
        with torch.inference_mode():
            scores = staged_scores(self.contextual, self.images.inputs)
        logits, shortlists = (tuple(tensor.cpu() for tensor in tensors) for tensors in scores[:2])
        return StagedScores(logits, shortlists, scores.stages)

    def modulations(self, part: str) -> list[Modulation]:
        """Of the layers that have a weight_offset, or a sampling_offset."""
        found = [m for m in record_modulations(self.contextual, self.images.inputs) if getattr(m, part) is not None]
        if not found:
            raise UserError(
                f"no convolution of {self.trained.path} has a {part.replace('_', ' ')}",
                "this figure needs a model that was trained with them (model.convolution=contextual)",
            )
        return found


def draw_gradcam(subject: Subject, path: Path) -> None:
    stage = subject.arguments.stage
    cams = {}
    for trained in (subject.trained, subject.twin):
        if trained is not None:
            _check_classes(subject, trained)
            model = trained.model.to(subject.world.device)
            layer = last_convolution(model, stage)
            cams[trained.settings.name] = cam = grad_cam(model, layer, subject.images.inputs)
            if cam.maps[0].numel() == 1:
                raise UserError(
                    f"stage {stage} has a single position for images of {subject.images.inputs.shape[-1]} pixels",
                    f"--stage {max(1, stage - 1)}",
                )
    plot_grad_cam(subject.images, cams, subject.classes, stage, path)


def draw_embeddings(subject: Subject, path: Path) -> None:
    points = project(subject.contextual.class_embeddings.weight)
    plot_considered_classes(points, subject.images, subject.scores, subject.classes, path)


def draw_similarity(subject: Subject, path: Path) -> None:
    contextual = subject.contextual
    if subject.twin is None:
        raise UserError("similarity compares the model with its plain twin", "add --twin outputs/NAME_PLAIN")
    _check_classes(subject, subject.twin)
    classifier = getattr(subject.twin.model, "get_classifier", lambda: None)()
    if not isinstance(classifier, nn.Linear):
        raise UserError(f"{subject.twin.path} has no linear classifier to compare with", "give a plain model as --twin")
    matrices = {
        f"{subject.name}, embeddings": class_similarity(contextual.class_embeddings.weight),
        f"{subject.twin.settings.name}, classifier": class_similarity(classifier.weight),
    }
    for name, matrix in matrices.items():
        pairs = off_diagonal(matrix)
        print(f"{name}: different classes {pairs.mean():+.4f} on average, {pairs.abs().mean():.4f} in absolute value")
    plot_similarity(matrices, path)


def draw_sampling(subject: Subject, path: Path) -> None:
    size = subject.trained.data.image_size
    point = tuple(subject.arguments.point or (size // 2, size // 2))
    if not all(0 <= at < size for at in point):
        raise UserError(f"--point {point[0]} {point[1]} is outside the image", f"numbers from 0 to {size - 1}")
    plot_sampling_points(subject.contextual, subject.images, subject.modulations("sampling_offset"), point, path)


def draw_weights(subject: Subject, path: Path) -> None:
    if len(subject.images.names) < 2:
        raise UserError("weights compares images, and there is one", "give several --images, or --count 4")
    modulations = subject.modulations("weight_offset")
    for modulation in modulations:
        sizes = offset_sizes(modulation)
        print(f"{modulation.name}: dw relative to w, mean {sizes.mean:.1%}, between images {sizes.between:.1%}")
    # every stage's layers are below one module
    stage = subject.contextual.feature_info[-4:][subject.arguments.stage - 1]["module"]
    of_stage = [modulation for modulation in modulations if modulation.name.startswith(f"{stage}.")]
    if not of_stage:
        raise UserError(
            f"stage {subject.arguments.stage} has no contextual convolution",
            f"--stage with one of {', '.join(map(str, subject.contextual.contextual_stages))}",
        )
    plot_weight_offsets(subject.images, of_stage[-1], path)


def draw_shortlist(subject: Subject, path: Path) -> None:
    plot_shortlists(subject.images, subject.scores, subject.classes, path)


def draw_context(subject: Subject, path: Path) -> None:
    batches = subject.data.evaluation_batches(subject.world)
    spreads = context_spread(subject.contextual, ((batch.images, batch.targets) for batch in batches))
    what = "images of NOISE" if subject.data.settings.is_noise else "val images"
    title = f"{subject.name}: contexts and offsets over {batches.images} {what}"
    Console().print(spread_table(spreads, title))
    report = {"images": batches.images, "stages": {stage: spread._asdict() for stage, spread in spreads.items()}}
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    plot_context_spread(spreads, title, path)


@torch.inference_mode()
def draw_recall(subject: Subject, path: Path) -> None:
    batches = subject.data.evaluation_batches(subject.world)
    curves = recall_curves((staged_scores(subject.model, batch.images), batch.targets) for batch in batches)
    sizes = subject.model.shortlist_sizes if isinstance(subject.model, ContextualModel) else {}
    what = "images of NOISE" if subject.data.settings.is_noise else "val images"
    title = f"{subject.name}: recall after each stage, {batches.images} {what}"
    plot_recall(curves, sizes, title, path)


FIGURES = {
    "gradcam": draw_gradcam,
    "embeddings": draw_embeddings,
    "similarity": draw_similarity,
    "sampling": draw_sampling,
    "weights": draw_weights,
    "shortlist": draw_shortlist,
    "context": draw_context,
    "recall": draw_recall,
}


def _check_classes(subject: Subject, other: Trained) -> None:
    if other.classes != subject.trained.classes:
        raise UserError(
            f"{other.path} was trained on other classes than {subject.trained.path}",
            "give a --twin of the same data",
        )


def mirror(trained: Trained, figures: dict[str, Path]) -> None:
    """Adds the figures to the training's own run on W&B, offline where there is no key."""
    import wandb

    settings = replace(LoggerSettings(**trained.config["logger"]), wandb="auto")
    logger = WandbLogger(trained.folder, settings, trained.config, trained.config["run_name"])
    logger.log(trained.step, {f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()})
    logger.close()


if __name__ == "__main__":
    run_script(main)

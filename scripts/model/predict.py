"""Names what is on images: the five likeliest classes, and the shortlist that each stage handed on.

python scripts/model/predict.py IMAGE_OR_FOLDER --checkpoint outputs/NAME [--output FILE]

An image gives a table and an annotated PNG; a folder, searched with its subfolders, a CSV with a row per image. Images
that cannot be read are named and skipped, and the script then ends with status 1.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display on a cluster

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from timm.data import create_transform

from contextual_cnn.data.image_check import FORMATS, open_image, reason_of
from contextual_cnn.errors import UserError, run_script
from contextual_cnn.models.contextual_model import staged_scores
from contextual_cnn.runs.csv_file import write_csv
from contextual_cnn.text import printable
from contextual_cnn.trained import Trained, describe_classes, load_model

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
# PIL's names of what is in such files. Training takes no GIF, for DALI decodes none; here it is the first picture
READ_AS = (*FORMATS, "GIF")
TOP = 5
FIRST = 4  # classes of a shortlist that are shown


class Shortlist(NamedTuple):
    """The classes that a stage handed on, likeliest first."""

    stage: int
    classes: list[int]


class Prediction(NamedTuple):
    """top: (class, probability), likeliest first."""

    path: Path
    top: list[tuple[int, float]]
    shortlists: list[Shortlist]


def main() -> None:
    arguments = parse_arguments()
    paths = images_below(arguments.images)
    given = load_model(arguments.checkpoint, arguments.weights)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    given.model.to(best if arguments.device == "auto" else arguments.device)
    unreadable: list[Path] = []
    predictions = list(predict(given, paths, arguments.batch_size, unreadable))
    words = describe_classes(given.classes)
    names = [printable(words.get(name, name).split(",")[0]) for name in given.classes]
    try:
        if arguments.images.is_dir():
            output = arguments.output or Path("predictions.csv")
            write_csv(output, rows(predictions, given.classes, names))
            print(f"{printable(str(output))}: {len(predictions)} images")
        elif predictions:
            output = arguments.output or Path(f"{arguments.images.stem}_prediction.png")
            show(predictions[0], names, given)
            draw_prediction(predictions[0], names, given, output)
            print(printable(str(output)))
    except OSError as error:
        raise UserError(f"the result cannot be written: {error}", "--output FILE") from error
    sys.exit(1 if unreadable else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("images", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder (outputs/NAME) or a .pt file")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: IMAGE_prediction.png or predictions.csv")
    parser.add_argument("--weights", choices=["auto", "raw", "ema"], default="auto")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be 1 or more, got {arguments.batch_size}")
    return arguments


def images_below(given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    paths = sorted(path for path in given.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not paths:
        what = "holds no image" if given.is_dir() else "does not exist"
        raise UserError(f"{given} {what}", f"give an image or a folder of images ({', '.join(sorted(IMAGES))})")
    return paths


@torch.inference_mode()
def predict(given: Trained, paths: Sequence[Path], batch_size: int, unreadable: list[Path]) -> Iterator[Prediction]:
    """In the order of the paths; those that cannot be read are printed and added to `unreadable`."""
    transform = create_transform(**given.transform)
    device = next(given.model.parameters()).device
    starts = range(0, len(paths), batch_size)
    for start in track(starts, "predicting", console=Console(stderr=True), disable=len(starts) == 1):
        readable, images = [], []
        for path in paths[start : start + batch_size]:
            try:
                images.append(transform(open_image(path.read_bytes(), READ_AS).convert("RGB")))
                readable.append(path)
            except Exception as error:  # whatever a damaged file makes of its decoder
                print(f"skipped, cannot be read: {printable(str(path))} ({reason_of(error)})", file=sys.stderr)
                unreadable.append(path)
        if images:
            yield from interpret(given.model, readable, torch.stack(images).to(device))


def interpret(model: torch.nn.Module, paths: list[Path], images: torch.Tensor) -> Iterator[Prediction]:
    scores = staged_scores(model, images)
    top = scores.logits[-1].softmax(dim=1).topk(min(TOP, model.num_classes), dim=1)
    # The model hands them on without an order
    ordered = [
        shortlist.gather(1, logits.gather(1, shortlist).argsort(dim=1, descending=True)).tolist()
        for logits, shortlist in zip(scores.logits[:-1], scores.shortlists, strict=True)
    ]
    for i, path in enumerate(paths):
        shortlists = [Shortlist(stage, classes[i]) for stage, classes in zip(scores.stages[:-1], ordered, strict=True)]
        yield Prediction(path, list(zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)), shortlists)


def describe_shortlist(shortlist: Shortlist, names: Sequence[str]) -> str:
    first = ", ".join(names[i] for i in shortlist.classes[:FIRST])
    more = ", ..." if len(shortlist.classes) > FIRST else ""
    return f"after stage {shortlist.stage}: {len(shortlist.classes)} of {len(names)} classes: {first}{more}"


def show(prediction: Prediction, names: Sequence[str], given: Trained) -> None:
    table = Table(title=escape(printable(str(prediction.path))))
    table.add_column("class")
    table.add_column("name")
    table.add_column("probability", justify="right")
    for index, probability in prediction.top:
        table.add_row(escape(printable(given.classes[index])), escape(names[index]), f"{100 * probability:.2f} %")
    console = Console()
    console.print(table)
    for shortlist in prediction.shortlists:
        console.print(describe_shortlist(shortlist, names), markup=False, highlight=False, soft_wrap=True)


def draw_prediction(prediction: Prediction, names: Sequence[str], given: Trained, output: Path) -> None:
    """The part of the image that the model saw, its five classes, and its shortlists."""
    to_pixels = create_transform(**given.transform | {"mean": (0, 0, 0), "std": (1, 1, 1)})
    image = open_image(prediction.path.read_bytes(), READ_AS).convert("RGB")
    pixels = to_pixels(image).permute(1, 2, 0).clamp(0, 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(1, 1.2), layout="constrained")
    left.imshow(pixels)
    left.set_axis_off()
    classes, probabilities = zip(*reversed(prediction.top), strict=True)
    bars = right.barh(range(len(classes)), [100 * p for p in probabilities], color="tab:blue", height=0.6)
    right.bar_label(bars, fmt="%.1f %%", padding=3)
    right.set(xlim=(0, 115), xticks=range(0, 101, 25), xlabel="probability, %", title="five likeliest classes")
    right.set_yticks(range(len(classes)), [shorten(names[i], 28) for i in classes])
    right.spines[["top", "right"]].set_visible(False)
    lines = [shorten(describe_shortlist(shortlist, names), 130) for shortlist in prediction.shortlists]
    figure.supxlabel("\n".join(lines), fontsize=9, x=0.01, ha="left")
    figure.suptitle(shorten(f"{printable(prediction.path.name)}, by {given.settings.name}", 100))
    figure.savefig(output, dpi=120)
    plt.close(figure)


def shorten(text: str, length: int) -> str:
    """Plain text for matplotlib, which reads $ as the start of mathematics."""
    text = text if len(text) <= length else f"{text[: length - 3]}..."
    return text.replace("$", r"\$")


def rows(predictions: Sequence[Prediction], classes: Sequence[str], names: Sequence[str]) -> Iterator[Sequence[str]]:
    """Of the CSV; the header is the first."""
    ranks = range(1, min(TOP, len(classes)) + 1)
    yield ["image", *(f"{what}{rank}" for rank in ranks for what in ("class", "name", "probability"))]
    for prediction in predictions:
        cells = ((classes[i], names[i], f"{probability:.6f}") for i, probability in prediction.top)
        yield [str(prediction.path), *(cell for group in cells for cell in group)]


if __name__ == "__main__":
    run_script(main)

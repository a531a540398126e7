"""Names what is on images or videos: the five likeliest classes, and the shortlist that each stage handed on.

python scripts/model/predict.py IMAGE_OR_FOLDER --checkpoint outputs/NAME [--output FILE]
python scripts/model/predict.py VIDEO_OR_FOLDER --checkpoint outputs/NAME_OF_A_RUN_OF_VIDEOS [--output FILE.gif]
python scripts/model/predict.py IMAGE_OR_FOLDER --checkpoint outputs/NAME_OF_A_DETECTOR [--score 0.5]

A file gives a table and a picture, of a video with all frames of the clip (FILE.gif shows them in turns); a folder,
searched with its subfolders, a CSV with a row per file. A detector draws boxes and masks, of a folder it writes JSON.
Files that cannot be read are named and skipped, and the
script then ends with status 1.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from predict_picture import draw_prediction
from predict_subjects import Prediction, Subject, Videos, describe_shortlist, subject_of
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from contextual_cnn.data.image_check import reason_of
from contextual_cnn.data.video.decode import UnusableVideo
from contextual_cnn.errors import UserError, run_script
from contextual_cnn.runs.csv_file import write_csv
from contextual_cnn.text import printable
from contextual_cnn.trained import describe_classes, read_trained

TOP = 5


def main() -> None:
    arguments = parse_arguments()
    path, state, task = read_trained(arguments.checkpoint)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = best if arguments.device == "auto" else arguments.device
    if task == "instance_segmentation":
        # Here: a detector's packages, which others need not have
        from predict_scenes import predict_scenes

        from contextual_cnn.tasks.instance_segmentation.restore import restore_detector

        trained = restore_detector(path, state, arguments.weights)
        try:
            predict_scenes(trained, arguments.files, device, arguments.score, arguments.output)
        except OSError as error:
            raise UserError(f"the result cannot be written: {error}", "--output FILE") from error
    subject = subject_of(arguments.checkpoint, arguments.weights)
    paths = files_below(arguments.files, subject)
    animated = arguments.output is not None and arguments.output.suffix.lower() == ".gif"
    if animated and not (isinstance(subject, Videos) and arguments.files.is_file()):
        raise UserError(f"{arguments.output}: only a video becomes an animation", "--output FILE.png, or FILE.csv")
    subject.given.model.to(device)
    unreadable: list[Path] = []
    predictions = list(predict(subject, paths, arguments.batch_size, unreadable))
    classes = subject.given.classes
    words = describe_classes(classes)
    names = [printable(words.get(name, name).split(",")[0]) for name in classes]
    try:
        if arguments.files.is_dir():
            output = arguments.output or Path("predictions.csv")
            write_csv(output, rows(predictions, classes, names, subject.noun))
            print(f"{printable(str(output))}: {len(predictions)} {subject.noun}s")
        elif predictions:
            output = arguments.output or Path(f"{arguments.files.stem}_prediction.png")
            show(predictions[0], classes, names)
            draw_prediction(predictions[0], subject.pictures(paths[0]), names, subject.given.settings.name, output)
            print(printable(str(output)))
    except OSError as error:
        raise UserError(f"the result cannot be written: {error}", "--output FILE") from error
    sys.exit(1 if unreadable else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("files", type=Path, metavar="FILE_OR_FOLDER", help="images, or videos where the run had videos")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder (outputs/NAME) or a .pt file")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: NAME_prediction.png or predictions.csv")
    parser.add_argument("--weights", choices=["auto", "raw", "ema"], default="auto")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--score", type=float, default=0.5, help="of a detector: what is less certain is not shown")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be 1 or more, got {arguments.batch_size}")
    return arguments


def files_below(given: Path, subject: Subject) -> list[Path]:
    if given.is_file():
        return [given]
    paths = sorted(path for path in given.rglob("*") if path.suffix.lower() in subject.suffixes and path.is_file())
    if not paths:
        what = f"holds no {subject.noun}" if given.is_dir() else "does not exist"
        kinds = ", ".join(sorted(subject.suffixes))
        raise UserError(f"{given} {what}", f"give {subject.article} or a folder of {subject.noun}s ({kinds})")
    return paths


@torch.inference_mode()
def predict(subject: Subject, paths: Sequence[Path], batch_size: int, unreadable: list[Path]) -> Iterator[Prediction]:
    """In the order of the paths; those that cannot be read are printed and added to `unreadable`."""
    device = next(subject.given.model.parameters()).device
    starts = range(0, len(paths), batch_size)
    for start in track(starts, "predicting", console=Console(stderr=True), disable=len(starts) == 1):
        readable, inputs = [], []
        for path in paths[start : start + batch_size]:
            try:
                inputs.append(subject.read(path))
                readable.append(path)
            except UserError:  # nothing can be read here
                raise
            except Exception as error:  # whatever a damaged file makes of its decoder
                why = str(error) if isinstance(error, UnusableVideo) else reason_of(error)
                print(f"skipped, cannot be read: {printable(str(path))} ({why})", file=sys.stderr)
                unreadable.append(path)
        if inputs:
            yield from interpret(subject, readable, torch.stack(inputs).to(device))


def interpret(subject: Subject, paths: list[Path], inputs: torch.Tensor) -> Iterator[Prediction]:
    scores = subject.scores(inputs)
    logits = scores.logits[-1]
    top = logits.softmax(dim=1).topk(min(TOP, logits.shape[1]), dim=1)
    for i, path in enumerate(paths):
        likeliest = list(zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True))
        yield Prediction(path, likeliest, subject.shortlists(scores, i))


def show(prediction: Prediction, classes: Sequence[str], names: Sequence[str]) -> None:
    table = Table(title=escape(printable(str(prediction.path))))
    table.add_column("class")
    table.add_column("name")
    table.add_column("probability", justify="right")
    for index, probability in prediction.top:
        table.add_row(escape(printable(classes[index])), escape(names[index]), f"{100 * probability:.2f} %")
    console = Console()
    console.print(table)
    for shortlist in prediction.shortlists:
        console.print(describe_shortlist(shortlist, names), markup=False, highlight=False, soft_wrap=True)


def rows(
    predictions: Sequence[Prediction], classes: Sequence[str], names: Sequence[str], noun: str
) -> Iterator[Sequence[str]]:
    """Of the CSV; the header is the first."""
    ranks = range(1, min(TOP, len(classes)) + 1)
    yield [noun, *(f"{what}{rank}" for rank in ranks for what in ("class", "name", "probability"))]
    for prediction in predictions:
        cells = ((classes[i], names[i], f"{probability:.6f}") for i, probability in prediction.top)
        yield [str(prediction.path), *(cell for group in cells for cell in group)]


if __name__ == "__main__":
    run_script(main)

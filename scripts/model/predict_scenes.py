"""What predict.py does with a detector: boxes, masks and classes of the objects in a picture, and the shortlists.

A picture gives a table and a drawing. A folder gives JSON: file, class, score, and box and mask as COCO writes them.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display on a cluster

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from timm.data import ImageNetInfo

from contextual_cnn.data.detection.coco_loader import as_images, shown
from contextual_cnn.data.image_check import FORMATS, open_image, reason_of
from contextual_cnn.errors import UserError
from contextual_cnn.models.contextual_model import ContextualModel
from contextual_cnn.runs.own_files import replaced
from contextual_cnn.tasks.instance_segmentation.measure import packed, pasted, scaled
from contextual_cnn.tasks.instance_segmentation.restore import TrainedDetector
from contextual_cnn.text import printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
IMAGENET = 1000
FIRST = 4  # classes of a shortlist that are named


class Scene(NamedTuple):
    """pixels: (H, W, 3) uint8. boxes: (n, 4) in its pixels. masks: (n, H, W) bool. shortlists: classes by stage."""

    pixels: np.ndarray
    labels: list[int]
    scores: list[float]
    boxes: torch.Tensor
    masks: list[np.ndarray]
    shortlists: Mapping[int, list[int]]


def predict_scenes(trained: TrainedDetector, files: Path, device: str, score: float, output: Path | None) -> None:
    """Ends the script, with status 1 if a file could not be read.

    Args:
        score: what is less certain is not shown.
    """
    trained.model.to(device)
    paths = [files] if files.is_file() else sorted(p for p in files.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{files} holds no image", f"give an image or a folder of images ({', '.join(SUFFIXES)})")
    found, unreadable = [], False
    for number, path in enumerate(paths):
        try:
            scene = look(trained, path, score)
        except UserError:  # nothing can be read here
            raise
        except Exception as error:  # whatever a damaged file makes of its decoder
            print(f"skipped, cannot be read: {printable(str(path))} ({reason_of(error)})", file=sys.stderr)
            unreadable = True
            continue
        if files.is_file():
            output = output or Path(f"{files.stem}_prediction.png")
            show(trained, path, scene)
            draw(trained, path, scene, output)
        else:
            found += in_coco_form(trained, number, printable(str(path)), scene)
    if files.is_dir():
        output = output or Path("predictions.json")
        with replaced(output) as new:
            new.write_text(json.dumps(found) + "\n")
    if output is not None and not (files.is_file() and unreadable):
        print(printable(str(output)))
    sys.exit(1 if unreadable else 0)


@torch.inference_mode()
def look(trained: TrainedDetector, path: Path, score: float) -> Scene:
    """The objects in one picture, the most certain first."""
    with open_image(path.read_bytes(), FORMATS) as image:
        pixels = np.array(image.convert("RGB"))
    model = trained.model
    images, sizes = as_images([torch.from_numpy(shown(pixels, trained.data))], trained.data)
    images = images.to(next(model.parameters()).device)
    (answer,) = model(images, sizes)
    answer = {key: values[answer["scores"] >= score] for key, values in answer.items()}
    boxes, masks = scaled(answer, sizes[0], pixels.shape[:2])
    handed_on = model.body.shortlists_of(images) if isinstance(model.body, ContextualModel) else {}
    return Scene(
        pixels,
        [int(label) - 1 for label in answer["labels"]],
        answer["scores"].tolist(),
        boxes,
        list(pasted(masks, boxes, *pixels.shape[:2])),
        {stage: classes[0].tolist() for stage, classes in handed_on.items()},
    )


def show(trained: TrainedDetector, path: Path, scene: Scene) -> None:
    table = Table(title=escape(printable(str(path))))
    table.add_column("object")
    for name in ("certainty", "left", "top", "width", "height", "pixels"):
        table.add_column(name, justify="right")
    for label, score, box, mask in zip(scene.labels, scene.scores, scene.boxes.tolist(), scene.masks, strict=True):
        left, top, right, bottom = box
        sides = (f"{value:.0f}" for value in (left, top, right - left, bottom - top))
        table.add_row(escape(trained.classes[label]), f"{100 * score:.1f} %", *sides, f"{mask.sum()}")
    console = Console()
    console.print(table)
    for line in context_lines(trained, scene):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def context_lines(trained: TrainedDetector, scene: Scene) -> list[str]:
    """The context is of the classes that the backbone was trained for, not of the detector's."""
    if scene.shortlists and not trained.has_classes:
        return ["context: of random classes, which nothing has taught (model.weights=null in training)"]
    of_all = trained.model.body.num_classes or len(trained.model.body.class_embeddings.weight)
    lines = []
    for stage, classes in scene.shortlists.items():
        names = [context_name(trained, index, of_all) for index in classes[:FIRST]]
        more = ", ..." if len(classes) > FIRST else ""
        lines.append(f"context after stage {stage}: {len(classes)} of {of_all} classes: {', '.join(names)}{more}")
    return lines


def context_name(trained: TrainedDetector, index: int, of_all: int) -> str:
    if trained.model.context_loss is not None:  # taught the detector's own classes
        return trained.classes[index]
    if of_all != IMAGENET:
        return f"class {index}"
    return str(ImageNetInfo().index_to_description(index)).split(",")[0]


def draw(trained: TrainedDetector, path: Path, scene: Scene, output: Path) -> None:
    """The picture with boxes, masks and names; the shortlists below."""
    height, width = scene.pixels.shape[:2]
    figure, axes = plt.subplots(figsize=(9, 9 * height / width + 1), layout="constrained")
    colors = plt.get_cmap("tab20").colors
    blended = scene.pixels.astype(np.float32) / 255
    for i, mask in enumerate(scene.masks):
        blended[mask] = 0.5 * blended[mask] + 0.5 * np.array(colors[i % len(colors)])
    axes.imshow(blended, interpolation="nearest")
    for i, (label, score, box) in enumerate(zip(scene.labels, scene.scores, scene.boxes.tolist(), strict=True)):
        left, top, right, bottom = box
        color = colors[i % len(colors)]
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1.5))
        name = f"{trained.classes[label]} {100 * score:.0f} %"
        axes.text(left, top, name, fontsize=8, color="white", va="bottom", bbox={"facecolor": color, "pad": 1, "lw": 0})
    axes.set_axis_off()
    axes.set_title(f"{printable(path.name)}, by Mask R-CNN on {trained.settings.name}", fontsize=10)
    figure.supxlabel("\n".join(context_lines(trained, scene)), fontsize=8, x=0.01, ha="left")
    with replaced(output) as new:
        figure.savefig(new, format=output.suffix.lstrip(".") or "png", dpi=120)
    plt.close(figure)


def in_coco_form(trained: TrainedDetector, number: int, file: str, scene: Scene) -> Sequence[dict[str, Any]]:
    boxes = scene.boxes.tolist()
    return [
        {
            "image_id": number,
            "file_name": file,
            "category": trained.classes[label],
            "score": score,
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": packed(mask),
        }
        for label, score, (left, top, right, bottom), mask in zip(
            scene.labels, scene.scores, boxes, scene.masks, strict=True
        )
    ]

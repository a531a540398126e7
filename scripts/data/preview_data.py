"""Draws a contact sheet of training samples: what our loader makes of some images, beside timm's own transform.

python scripts/data/preview_data.py ROOT [--output preview.png] [--columns 8] [--image-size 128] [--loader dali]

Rows: the images, our samples of them, timm's, and ours with mixing. The draws differ; the recipe should look the same.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from contextual_cnn.analysis.timm_transforms import timm_transform
from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.image_check import decode_rgb
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.mixing import BatchAugmentation
from contextual_cnn.data.sampler import TrainSampler
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError, run_script
from contextual_cnn.randomness import Places, Purpose, seed_all
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GAP, MARGIN = 4, 92  # pixels: between images, and for the labels on the left


def main() -> None:
    arguments = parse_arguments()
    settings = DataSettings(
        root=str(arguments.root),
        image_size=arguments.image_size,
        loader=arguments.loader,
        mean=MEAN,
        std=STD,
    )
    data = ImageData(settings, ("train",))
    images = data.sources["train"]
    columns = min(arguments.columns, len(images) // 2 * 2)
    if columns < 2:
        raise UserError(f"{arguments.root} has {len(images)} training image, and mixing takes two", "give another root")
    chosen = np.sort(np.random.default_rng(arguments.seed).choice(len(images), columns, replace=False))
    data.sources["train"] = images = images.take(chosen)
    originals = [decode_rgb(images.read(i), images.name(i)) for i in range(columns)]
    alone = replace(AugmentSettings(), mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    size = (arguments.image_size, arguments.image_size)
    rows = [("image", [ImageOps.fit(image, size, Image.Resampling.BICUBIC) for image in originals])]
    rows += [("ours", row) for row in our_rows(data, alone, arguments.rows, arguments.seed)]
    rows += [("timm", row) for row in timm_rows(originals, alone, arguments)]
    rows += [("ours, mixed", row) for row in our_rows(data, AugmentSettings(), 2, arguments.seed + 1)]
    try:
        contact_sheet(rows, arguments.image_size).save(arguments.output, quality=85)
    except (OSError, ValueError) as error:  # ValueError: an extension that names no format
        raise UserError(f"{arguments.output} cannot be written: {error}", "--output FILE.png") from error
    print(arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder with train/, or train.txt")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), help=".png or .jpg")
    parser.add_argument("--columns", type=int, default=8, help="images")
    parser.add_argument("--rows", type=int, default=3, help="samples of each image by each loader")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--loader", choices=["dali", "torch"], default="dali")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def our_rows(data: ImageData, augment: AugmentSettings, rows: int, seed: int) -> list[list[Image.Image]]:
    """An epoch a row: a micro-batch of all images, put back into their order."""
    count = len(data.sources["train"])
    plan = BatchPlan.make(images=count, global_batch=count, micro_batch=count, world_size=1)
    sampler = TrainSampler(plan, seed, rank=0)
    batches = data.train_batches(plan, augment, seed, World(0, 1, 0, torch.device("cpu")), 0)
    mix = BatchAugmentation(augment, data.num_classes)
    pictures = []
    for n in range(rows):
        images = mix(next(batches), Places(seed, step=n, first=0, count=count)).images
        pictures.append([picture(images[i]) for i in np.argsort(sampler[n].indices)])
    return pictures


def timm_rows(originals: list[Image.Image], augment: AugmentSettings, arguments: argparse.Namespace) -> list:
    transform = timm_transform(augment, arguments.image_size, MEAN, STD)
    seed_all(Purpose.MICRO_BATCH, arguments.seed)
    return [[picture(transform(image)) for image in originals] for _ in range(arguments.rows)]


def picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) normalised."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    levels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def contact_sheet(rows: list[tuple[str, list[Image.Image]]], size: int) -> Image.Image:
    """Labelled rows of images; a wider gap where the label changes."""
    labels = [label for label, _ in rows]
    tops, top = [], GAP
    for i in range(len(rows)):
        top += 2 * GAP if i and labels[i] != labels[i - 1] else 0
        tops.append(top)
        top += size + GAP
    sheet = Image.new("RGB", (MARGIN + len(rows[0][1]) * (size + GAP), top), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for i, (y, (label, images)) in enumerate(zip(tops, rows, strict=True)):
        if i == 0 or label != labels[i - 1]:
            draw.text((MARGIN - 2 * GAP, y + size // 2), label, fill="black", font=font, anchor="rm")
        for column, image in enumerate(images):
            sheet.paste(image, (MARGIN + column * (size + GAP), y))
    return sheet


if __name__ == "__main__":
    run_script(main)

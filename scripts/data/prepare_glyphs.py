"""Renders accented letters as JPEG folders in ImageNet's layout: a fine-grained set that needs no download.

python scripts/data/prepare_glyphs.py FOLDER [--fonts FOLDER ...]

Classes are the letters of Latin-1 and Latin Extended-A (é, ê, ë, ě, ...), which differ by a few pixels. Fonts are
those installed, those that come with matplotlib, and those in --fonts. The families of the val split are not in
the train split.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

import matplotlib
from fontTools.ttLib import TTFont
from matplotlib.font_manager import findSystemFonts
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 40  # pixels; the training crop takes 32 of it
LETTERS = [chr(code) for code in range(0xC0, 0x180) if chr(code).isalpha() and code not in (0x132, 0x133, 0x149, 0x17F)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="folders of .ttf and .otf files")
    parser.add_argument("--train", type=int, default=64, help="images per class")
    parser.add_argument("--val", type=int, default=10, help="images per class")
    parser.add_argument(
        "--dark-ink", action="store_true", help="never light on dark, which takes models long to see through"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    families = find_families(arguments.fonts)
    splits = split_families(families)
    for split, count in (("train", arguments.train), ("val", arguments.val)):
        fonts = [font for family in splits[split] for font in families[family]]
        print(f"{split}: {len(LETTERS)} letters, {count} images each, {len(fonts)} fonts of {', '.join(splits[split])}")
        rng = random.Random(f"{arguments.seed} {split}")
        for letter in LETTERS:
            folder = arguments.folder / split / f"U+{ord(letter):04X}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                render(letter, rng.choice(fonts), rng, arguments.dark_ink).save(folder / f"{i:03d}.jpg", quality=90)


def find_families(folders: list[Path]) -> dict[str, list[Path]]:
    """Family name -> upright and slanted fonts of it that have all letters."""
    paths = [Path(path) for path in findSystemFonts([str(folder) for folder in folders] or None)]
    paths += sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    families = defaultdict(list)
    for path in sorted(set(paths)):
        if path.suffix.lower() not in (".ttf", ".otf") or "LastResort" in path.name:
            continue  # the last-resort font claims every letter and draws a box
        font = TTFont(path, lazy=True)
        if {ord(letter) for letter in LETTERS} <= font.getBestCmap().keys():
            families[font["name"].getBestFamilyName()].append(path)
    return dict(families)


def split_families(families: dict[str, list[Path]]) -> dict[str, list[str]]:
    """Every third family, in alphabetical order, is for validation."""
    names = sorted(families)
    if len(names) < 2:
        raise SystemExit(f"found {len(names)} font families with all letters, need 2; give a folder with --fonts")
    val = names[1::3]
    return {"train": [name for name in names if name not in val], "val": val}


def render(letter: str, font: Path, rng: random.Random, dark_ink: bool) -> Image.Image:
    """One letter, somewhere near the centre, a little turned, in some dark colour on some light one, or the reverse."""
    dark, light = (tuple(rng.randint(low, low + 90) for _ in range(3)) for low in (0, 160))
    ink, paper = (dark, light) if rng.random() < 0.5 or dark_ink else (light, dark)
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), paper)
    face = ImageFont.truetype(font, rng.randint(80, 105))
    at = (2 * SIZE + rng.uniform(-12, 12), 2 * SIZE + rng.uniform(-8, 8))
    ImageDraw.Draw(image).text(at, letter, fill=ink, font=face, anchor="mm")
    image = image.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, fillcolor=paper)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))


if __name__ == "__main__":
    main()

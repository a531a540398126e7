"""Writes scikit-learn's handwritten digits as JPEG folders in ImageNet's layout.

python scripts/data/prepare_digits.py FOLDER

1,797 real scans of 8x8 pixels (UCI, Optical Recognition of Handwritten Digits), enlarged to 32x32; a fifth of each
class is the val split. They come with the package, so nothing is downloaded.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    for name, images, labels in (("train", split[0], split[2]), ("val", split[1], split[3])):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / name / str(label) / f"{i:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            scan = Image.fromarray((image * (255 / 16)).astype(np.uint8))  # 17 grey levels, 0 to 16
            scan.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(path, quality=95)
        print(f"{folder / name}: {len(labels)} images of {len(digits.target_names)} digits")


if __name__ == "__main__":
    main()

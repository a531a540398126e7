"""Writes clips of moving digits, whose class is the direction: left, right, up or down.

python scripts/data/prepare_moving_digits.py FOLDER [--train 1600] [--val 400]

The digits are scikit-learn's scans; those of the val split are others than those of the train split. Every clip is
there backwards as well, under the opposite class: a model that ignores the order of the frames is right half the time
at most.
"""

import argparse
from pathlib import Path

import av
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

FRAMES, SIZE, DIGIT = 8, 32, 14
OPPOSITES = {"right": "left", "down": "up"}
AXES = {"right": (0, 1), "down": (1, 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=1600, help="clips, a multiple of 4")
    parser.add_argument("--val", type=int, default=400, help="clips, a multiple of 4")
    arguments = parser.parse_args()
    scans = np.random.default_rng(0).permutation(load_digits().images)
    fifth = len(scans) // 5
    for split, clips, digits in (("train", arguments.train, scans[fifth:]), ("val", arguments.val, scans[:fifth])):
        if clips < 4 or clips % 4:
            parser.error(f"--{split} must be a multiple of 4, got {clips}")
        draws = np.random.default_rng(split == "val")
        for i in range(clips // 4):
            digit = digits[draws.integers(len(digits))]
            for forward, backward in OPPOSITES.items():
                frames = moving(digit, AXES[forward], draws)
                write(arguments.folder / split / forward / f"{i:04d}.mov", frames)
                write(arguments.folder / split / backward / f"{i:04d}.mov", frames[::-1])
        print(f"{arguments.folder / split}: {clips} clips of {FRAMES} frames, 4 directions")


def moving(digit: np.ndarray, axis: tuple[int, int], draws: np.random.Generator) -> np.ndarray:
    """(T, H, W, 3) uint8: the digit goes along the axis at 1 to 2 pixels a frame, in front of a noisy background."""
    sprite = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
    speed = draws.integers(1, 3)
    room = SIZE - DIGIT - np.array(axis) * speed * (FRAMES - 1)
    start = draws.integers(0, room + 1)
    background = draws.integers(0, 64, (SIZE, SIZE)).astype(np.uint8)
    frames = np.repeat(background[None], FRAMES, axis=0)
    for t in range(FRAMES):
        top, left = start + np.array(axis) * speed * t
        place = frames[t, top : top + DIGIT, left : left + DIGIT]
        np.maximum(place, np.asarray(sprite), out=place)
    return np.repeat(frames[..., None], 3, axis=-1)


def write(path: Path, frames: np.ndarray) -> None:
    """PNG pictures, which lose nothing: a JPEG encoder's rate control would tell first frames from last ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main()

"""Makes a data set for training from Kinetics' official lists and the clips that you have.

python scripts/data/prepare_kinetics.py LISTS VIDEOS ROOT [--short-side 256] [--workers N]

LISTS is the folder with train.csv and val.csv (or validate.csv), with the columns label, youtube_id, time_start and
time_end. VIDEOS is a folder of clips with any subfolders; a clip is found by its name, ID_START_END as in
0wR5jVB-WPk_000417_000427.mp4, or ID alone. Each is transcoded once, to ROOT/SPLIT/LABEL/ID_START_END.mov: MJPEG of a
shorter side of 256 pixels, so that a training decodes no frame that it does not use. What is missing, or cannot be
used, is in ROOT/left_out.csv with the reason. After an interruption the same command continues, and adds clips that
have come since. No file is ever visible half written.
"""

import argparse
import csv
import functools
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from contextual_cnn.data.process_pool import process_pool, run_parts
from contextual_cnn.data.sources.folder_listing import VIDEO_FILES
from contextual_cnn.data.video.decode import UnusableVideo, import_av
from contextual_cnn.data.video.transcode import transcode
from contextual_cnn.errors import UserError, run_script
from contextual_cnn.runs.csv_file import write_csv
from contextual_cnn.text import printable

LISTS = {"train": ("train.csv",), "val": ("val.csv", "validate.csv")}
COLUMNS = ("label", "youtube_id", "time_start", "time_end")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a YouTube id: it becomes a part of a path
MISSING = "not there"
UNFINISHED = ".unfinished"  # a folder of ROOT


class Clip(NamedTuple):
    """A row of a list. folder: of its class."""

    split: str
    folder: str
    youtube_id: str
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.youtube_id}_{self.start:06d}_{self.end:06d}"


def main() -> None:
    arguments = parse_arguments()
    import_av()
    clips = [clip for split in LISTS for clip in read_list(arguments.lists, split)]
    files = videos_below(arguments.videos)
    found = {clip: files.get(clip.name, files.get(clip.youtube_id)) for clip in clips}
    if not any(found.values()):
        raise UserError(
            f"none of the {len(clips)} clips of the lists is below {arguments.videos}",
            f"name them as {clips[0].name}.mp4, or {clips[0].youtube_id}.mp4",
        )
    parts = [(clip, path) for clip, path in found.items() if path is not None]
    with process_pool(arguments.workers) as pool:
        reasons = run_parts(pool, functools.partial(write_clip, arguments), parts, title="videos")
    shutil.rmtree(arguments.root / UNFINISHED, ignore_errors=True)
    left_out = {clip: MISSING for clip, path in found.items() if path is None}
    left_out |= {clip: reason for (clip, _), reason in zip(parts, reasons, strict=True) if reason is not None}
    write_csv(arguments.root / "left_out.csv", rows(left_out, found))
    print_summary(clips, left_out, arguments.root)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("lists", type=Path, help="folder with train.csv and val.csv")
    parser.add_argument("videos", type=Path, help="folder with the clips")
    parser.add_argument("root", type=Path, help="folder to write to, data.root of the training")
    parser.add_argument("--short-side", type=int, default=256, metavar="PIXELS", help="(default %(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    arguments = parser.parse_args()
    for name, low, high in (("short_side", 32, 4096), ("quality", 1, 95), ("workers", 1, 1024)):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}")
    return arguments


def read_list(folder: Path, split: str) -> Iterator[Clip]:
    """The clips of a split.

    Raises:
        UserError: no list, no such columns, or a row that cannot be.
    """
    path = next((folder / name for name in LISTS[split] if (folder / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{folder} has no {' and no '.join(LISTS[split])}", "give the folder of Kinetics' official lists"
        )
    with path.open(newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        if lacking := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise UserError(f"{path} has no column {', '.join(lacking)}", f"the columns are {', '.join(COLUMNS)}")
        for row in reader:
            try:
                yield _clip(split, row)
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}, line {reader.line_num}: {printable(str(error))}",
                    "use the official list, or drop the line",
                ) from error


def _clip(split: str, row: Mapping[str, str]) -> Clip:
    if any(row[name] is None for name in COLUMNS):
        raise ValueError("it has too few columns")
    label, youtube_id = row["label"].strip(), row["youtube_id"].strip()
    folder = re.sub(r"[^\w(),&'-]+", "_", label)
    if not folder.strip("_."):
        raise ValueError(f"no label: {label!r}")
    if not NAME.fullmatch(youtube_id):
        raise ValueError(f"no YouTube id: {youtube_id!r}")
    start, end = int(float(row["time_start"])), int(float(row["time_end"]))
    if not 0 <= start < end < 10**6:
        raise ValueError(f"no times: {start} to {end} s")
    return Clip(split, folder, youtube_id, start, end)


def videos_below(folder: Path) -> dict[str, Path]:
    """By name without extension."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "give the folder with the clips")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_FILES.extensions)
    return {path.stem: path for path in sorted(paths) if path.is_file()}


def write_clip(arguments: argparse.Namespace, part: tuple[Clip, Path]) -> str | None:
    """Why it cannot be used, or None. What is there already stays as it is."""
    clip, path = part
    target = arguments.root / clip.split / clip.folder / f"{clip.name}.mov"
    if target.exists():
        return None
    # Outside of the class's folder: a file that a killed process left there would be taken for a video
    new = arguments.root / UNFINISHED / f"{clip.split}_{clip.name}.mov"
    for file in (target, new):
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        transcode(path.read_bytes(), new, arguments.short_side, arguments.quality)
        new.replace(target)
    except UnusableVideo as error:
        return str(error)
    return None


def rows(left_out: Mapping[Clip, str], found: Mapping[Clip, Path | None]) -> Iterator[Sequence[str]]:
    yield ("split", "class", "clip", "file", "reason")
    for clip, reason in left_out.items():
        yield (clip.split, clip.folder, clip.name, str(found[clip] or ""), reason)


def print_summary(clips: Sequence[Clip], left_out: Mapping[Clip, str], root: Path) -> None:
    for split in LISTS:
        listed = [clip for clip in clips if clip.split == split]
        why = Counter(left_out[clip] == MISSING for clip in listed if clip in left_out)
        there = [clip for clip in listed if clip not in left_out]
        classes = len({clip.folder for clip in there})
        text = f"{len(listed)} listed, {why[True]} not there, {why[False]} that cannot be used"
        print(f"{root / split}: {len(there)} videos in {classes} classes ({text})")
    if left_out:
        print(f"left out: {root / 'left_out.csv'}")


if __name__ == "__main__":
    run_script(main)

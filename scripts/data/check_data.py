"""Reads and decodes every image of a data set, and reports what is damaged or unusual.

python scripts/data/check_data.py ROOT [--write-exclude FILE] [--duplicates] [--output FILE]

Works on class folders, list files and tar shards. Bad is what training cannot use: truncated files,
files that are no images, decompression bombs. Ends with status 1 if there are any; the exclude list names them for
data.exclude. Files that training does not look at (.heic, .gif, files beside the class folders) are counted.
"""

import argparse
import functools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contextual_cnn.data.image_check import ImageReport, check_images
from contextual_cnn.data.process_pool import process_pool, run_parts
from contextual_cnn.data.sources import ImageSource, find_layout, open_source, write_exclude_list
from contextual_cnn.data.sources.folder_listing import describe_not_read
from contextual_cnn.data.sources.shard_index import check_shard_index
from contextual_cnn.data.sources.tar_shards import shards_of
from contextual_cnn.errors import UserError, run_script
from contextual_cnn.text import printable

CHUNK = 64  # images that a process checks at a time
SHOWN = 20  # names on the screen; the JSON has all


def main() -> None:
    arguments = parse_arguments()
    root = arguments.root.expanduser().absolute()
    layout = find_layout(root, arguments.splits[0]) if arguments.layout == "auto" else arguments.layout
    with process_pool(arguments.workers) as pool:
        if layout == "shards":
            shards = [shard for split in arguments.splits for shard in shards_of(root, split)]
            run_parts(pool, check_shard_index, shards, title="indices of the shards")
        sources, reports = {}, {}
        for split in arguments.splits:
            classes = next(iter(sources.values())).classes if sources else None
            sources[split] = source = open_source(root, split, layout, classes)
            parts = [source.take(range(i, min(i + CHUNK, len(source)))) for i in range(0, len(source), CHUNK)]
            check = functools.partial(check_images, arguments.duplicates)
            results = run_parts(pool, check, parts, title=f"{split}, images", sizes=[len(part) for part in parts])
            reports[split] = ImageReport.merge(results)
    summary = {
        "root": printable(str(root)),
        "layout": layout,
        "splits": {split: summarise(sources[split], report) for split, report in reports.items()},
    }
    if arguments.duplicates:
        summary["duplicates"] = find_duplicates(reports)
    show(summary)
    bad = [entry for report in reports.values() for entry in report.bad]
    write_results(arguments, summary, bad)
    sys.exit(1 if bad else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument("root", type=Path, help="folder with train/ and val/, or train.txt and val.txt")
    parser.add_argument("--layout", choices=["auto", "folders", "list", "shards"], default="auto")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], metavar="SPLIT")
    parser.add_argument("--write-exclude", type=Path, metavar="FILE", help="name the bad files for data.exclude")
    parser.add_argument("--duplicates", action="store_true", help="look for images with the same bytes")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the whole report as JSON")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    arguments = parser.parse_args()
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers must be 1 or more, got {arguments.workers}")
    return arguments


def summarise(source: ImageSource, report: ImageReport) -> dict:
    """One split's numbers, and the names behind them."""
    per_class = np.bincount(source.targets, minlength=len(source.classes))
    unusual = defaultdict(list)
    for name, kind in report.unusual:
        unusual[kind].append(name)
    return {
        "images": len(source),
        "classes": len(source.classes),
        "images_per_class": {"least": int(per_class.min()), "most": int(per_class.max())},
        "bad": [{"name": name, "reason": reason} for name, reason in report.bad],
        "not_read": dict(source.not_read.most_common()),
        "kinds": dict(report.kinds.most_common()),
        "unusual": unusual,
    }


def find_duplicates(reports: dict[str, ImageReport]) -> list[list[str]]:
    """Groups of images with the same bytes."""
    groups = defaultdict(list)
    for report in reports.values():
        for digest, name in report.digests:
            groups[digest].append(name)
    return [names for names in groups.values() if len(names) > 1]


def show(summary: dict) -> None:
    console = Console()
    table = Table(title=escape(f"{summary['root']} ({summary['layout']})"))
    table.add_column("")
    for split in summary["splits"]:
        table.add_column(split, justify="right")
    splits = summary["splits"].values()
    table.add_row("images", *(str(split["images"]) for split in splits))
    table.add_row("classes", *(str(split["classes"]) for split in splits))
    table.add_row("images per class", *("{least} to {most}".format(**split["images_per_class"]) for split in splits))
    for kind in sorted({kind for split in splits for kind in split["kinds"]}):
        table.add_row(kind, *(str(split["kinds"].get(kind, 0)) for split in splits))
    table.add_row("bad", *(str(len(split["bad"])) for split in splits))
    table.add_row("not read", *(str(sum(split["not_read"].values())) for split in splits))
    console.print(table)
    for line in summary_lines(summary):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary_lines(summary: dict) -> Iterator[str]:
    """What the table counts, by name."""
    for name, split in summary["splits"].items():
        if split["not_read"]:
            yield f"not read in {name}: {describe_not_read(Counter(split['not_read']))}"
    bad = [entry for split in summary["splits"].values() for entry in split["bad"]]
    for entry in bad[:SHOWN]:
        yield f"bad: {entry['name']}: {entry['reason']}"
    if len(bad) > SHOWN:
        yield f"and {len(bad) - SHOWN} more"
    for names in summary.get("duplicates", [])[:SHOWN]:
        yield f"same bytes: {', '.join(names)}"
    if "duplicates" in summary:
        yield f"{len(summary['duplicates'])} groups of images with the same bytes"


def write_results(arguments: argparse.Namespace, summary: dict, bad: list[tuple[str, str]]) -> None:
    try:
        if arguments.output:
            arguments.output.write_text(json.dumps(summary, indent=2) + "\n")
        if arguments.write_exclude:
            write_exclude_list(arguments.write_exclude, bad)
            print(f"train without them: data.exclude={printable(str(arguments.write_exclude))}")
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}", "give another file") from error


if __name__ == "__main__":
    run_script(main)

"""Which layout a root has, and opening a split of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from contextual_cnn.data.sources.benchmark_folders import open_benchmark_folders
from contextual_cnn.data.sources.class_folders import open_class_folders
from contextual_cnn.data.sources.file_list import open_file_list
from contextual_cnn.data.sources.folder_listing import entries_of, is_folder
from contextual_cnn.data.sources.source import ImageSource
from contextual_cnn.data.sources.synthetic import open_synthetic
from contextual_cnn.data.sources.tar_shards import open_tar_shards, shards_of
from contextual_cnn.errors import UserError

Layout = Literal["folders", "list", "shards", "benchmark", "synthetic"]

_OPEN: Mapping[Layout, Callable[[Path, str, tuple[str, ...] | None], ImageSource]] = {
    "folders": open_class_folders,
    "list": open_file_list,
    "shards": open_tar_shards,
    "benchmark": open_benchmark_folders,
    "synthetic": open_synthetic,
}


def find_layout(root: Path, split: str) -> Layout:
    """Looks which layout a split has; class folders where it finds none, for their messages say what is missing.

    Raises:
        UserError: more than one layout.
    """
    found: dict[Layout, bool] = {
        "folders": _has_folders(root / split),
        "list": (root / f"{split}.txt").is_file(),
        "shards": bool(shards_of(root, split)),
    }
    layouts = [layout for layout, is_there in found.items() if is_there]
    if len(layouts) > 1:
        raise UserError(
            f"data.root: {root} has {split} as {' and as '.join(layouts)}", f"data.layout={layouts[0]}, or another root"
        )
    if not layouts and split == "val" and _has_folders(root) and not (root / "train").exists():
        return "benchmark"  # never to train on, where a missing train/ is a mistake
    return layouts[0] if layouts else "folders"


def open_source(root: Path, split: str, layout: Layout, classes: tuple[str, ...] | None = None) -> ImageSource:
    """Opens a split.

    Args:
        classes: the classes that the targets refer to; None takes the split's own.

    Raises:
        UserError: what was looked for and what was found instead.
    """
    return _OPEN[layout](root, split, classes)


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(map(is_folder, entries_of(folder)))

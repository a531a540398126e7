"""Class folders with no split around them, as the variants of ImageNet come: ROOT/CLASS/IMAGE, to evaluate on.

There may be fewer classes than the model has (ImageNet-A and -R have 200). Their names are the training's, or class
numbers (ImageNetV2 has folders 0 to 999: positions in the training's order of classes, the sorted WordNet ids).
"""

from pathlib import Path

from contextual_cnn.data.sources.class_folders import describe_folder, find_class_folders, list_class_folders
from contextual_cnn.data.sources.source import ImageFiles
from contextual_cnn.errors import UserError


def open_benchmark_folders(root: Path, split: str, classes: tuple[str, ...] | None = None) -> ImageFiles:
    """Lists the folders by class, then images by name; `ImageFiles.classes` are all of the model's.

    Args:
        split: has no folder here, and only says what the images are wanted for.
        classes: of the model.

    Raises:
        UserError: they are to be trained on; no class folders; a folder that is none of the classes, or one twice.
    """
    if split != "val" or classes is None:
        raise UserError(
            f"data.root: {root} has class folders without train/ and val/, which are for evaluation only",
            "set data.root=ROOT of ROOT/train/CLASS/IMAGE.jpg and ROOT/val/CLASS/IMAGE.jpg",
        )
    if not root.is_dir():
        raise UserError(f"data.root: looked for the folder {root}, found {describe_folder(root)}", "data.root=FOLDER")
    found, beside = find_class_folders(root)
    targets = sorted(_targets(root, list(found), classes).items(), key=lambda item: item[1])
    return list_class_folders(root, {found[name]: target for name, target in targets}, classes, beside)


def _targets(root: Path, names: list[str], classes: tuple[str, ...]) -> dict[str, int]:
    """Each folder's class, by its name where all of them are the training's, else by its number."""
    if not names:
        raise UserError(f"data.root: {root} has no class folders, found {describe_folder(root)}", "data.root=FOLDER")
    position = {name: target for target, name in enumerate(classes)}
    unknown = [name for name in names if name not in position]
    if not unknown:
        return {name: position[name] for name in names}
    numbers = {name: int(name) for name in names if name.isascii() and name.isdigit()}
    if len(numbers) == len(names) == len(set(numbers.values())) and max(numbers.values()) < len(classes):
        return numbers
    raise UserError(
        f"data.root: {root} has folders that are none of the model's {len(classes)} classes: {', '.join(unknown[:3])}",
        f"data.root=ROOT of ROOT/val/CLASS/IMAGE.jpg; or folders named like {classes[0]}, or by the class's number, "
        f"0 to {len(classes) - 1}",
    )

"""The two kinds of batches of scenes: PIL, pycocotools and torchvision's transforms in worker processes.

Shapes: B images of a batch, padded to H W, multiples of 32; n objects of an image.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from contextual_cnn.data.bad_images import BadImage, BadImages, first_usable
from contextual_cnn.data.detection.annotations import CocoImages, Objects, is_usable
from contextual_cnn.data.detection.masks import masks_of
from contextual_cnn.data.detection.transforms import COLUMNS, Scene, augmented, fitted
from contextual_cnn.data.image_check import open_image, reason_of
from contextual_cnn.data.on_device import normalise
from contextual_cnn.data.reader import read_image
from contextual_cnn.data.resize import resize
from contextual_cnn.data.sampler import TrainSampler, evaluation_batches
from contextual_cnn.data.transfer import to_device
from contextual_cnn.data.worker_batches import received, worker_loader
from contextual_cnn.distributed import World
from contextual_cnn.randomness import Purpose, uniform_rows
from contextual_cnn.settings.coco import CocoSettings
from contextual_cnn.settings.scale_augment import ScaleAugmentSettings

_STRIDE = 32  # of the models' last stage
_BLANK = np.zeros((_STRIDE, _STRIDE, 3), np.uint8)  # in place of an image that cannot be used


class Scenes(NamedTuple):
    """Images ready for a detector.

    images: (B, 3, H, W) float32, normalised, channels_last; zeros beyond an image's own size.
    sizes: height and width of each image within the padding.
    targets: of each training image boxes (n, 4) float32 (left, top, right, bottom), labels (n,) int64 from 1 on, masks
        (n, H, W) uint8; in an evaluation nothing.
    indices: places in the source. usable: whether each image could be decoded; a blank stands in for another.
    replaced: training images that stand in for others, which cannot be used.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    targets: list[dict[str, Tensor]]
    indices: list[int]
    usable: list[bool]
    replaced: int = 0

    @property
    def size(self) -> int:
        return len(self.sizes)


class _Made(NamedTuple):
    """What a worker hands over: `Scenes`, but for pixels (B, H, W, 3) uint8; and what is told of bad images."""

    pixels: Tensor
    sizes: list[tuple[int, int]]
    targets: list[dict[str, Tensor]]
    indices: list[int]
    usable: list[bool]
    reports: list[BadImage]
    replaced: int = 0


def train_batches(
    images: CocoImages,
    sampler: TrainSampler,
    augment: ScaleAugmentSettings,
    bad: BadImages,
    settings: CocoSettings,
    device: torch.device,
) -> Iterator[Scenes]:
    """Endless micro-batches with targets, on the device."""
    loader = worker_loader(partial(_make_training_batch, images, sampler, augment), count(), settings, device)
    for made in received(loader, bad):
        yield _on_device(made, settings, device)


class EvaluationBatches:
    """A rank's share of a split, each image once, as often as iterated.

    Attributes:
        images: how many the whole split has.
    """

    def __init__(self, images: CocoImages, bad: BadImages, settings: CocoSettings, world: World) -> None:
        self.images = len(images)
        shares = list(evaluation_batches(len(images), settings.eval_batch_size, world.rank, world.size))
        make = partial(_make_evaluation_batch, images, settings, shares)
        self._settings, self._device, self._bad = settings, world.device, bad
        self._loader = worker_loader(make, range(len(shares)), settings, world.device)

    def __iter__(self) -> Iterator[Scenes]:
        """One pass."""
        for made in received(self._loader, self._bad):
            yield _on_device(made, self._settings, self._device)


def as_images(pixels: Sequence[Tensor], settings: CocoSettings) -> tuple[Tensor, list[tuple[int, int]]]:
    """(H, W, 3) uint8 each -> a padded batch as a detector takes it, and the sizes within the padding."""
    sizes = [(int(image.shape[0]), int(image.shape[1])) for image in pixels]
    return _normalised(_padded(pixels), sizes, settings), sizes


def _normalised(pixels: Tensor, sizes: Sequence[tuple[int, int]], settings: CocoSettings) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, zeros beyond each image."""
    images = normalise(pixels.permute(0, 3, 1, 2), settings.mean, settings.std)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    return images


def _on_device(made: _Made, settings: CocoSettings, device: torch.device) -> Scenes:
    sizes = [(height, width) for height, width in made.sizes]  # a DataLoader makes lists of tuples
    images = _normalised(to_device(made.pixels, device), sizes, settings)
    targets = [{name: to_device(value, device) for name, value in of.items()} for of in made.targets]
    return Scenes(images, sizes, targets, made.indices, made.usable, made.replaced)


def _make_training_batch(images: CocoImages, sampler: TrainSampler, augment: ScaleAugmentSettings, n: int) -> _Made:
    batch, replaced = sampler[n], 0
    reports: list[BadImage] = []
    scenes, indices = [], []
    key = (sampler.seed, batch.epoch)
    draws = uniform_rows(Purpose.SCENE, *key, start=batch.start, rows=len(batch.indices), columns=COLUMNS)
    for i, (wanted, uniform) in enumerate(zip(batch.indices, draws, strict=True)):
        index, scene = first_usable(sampler.candidates(n, i), partial(training_scene, images), reports.append)
        assert index is not None  # there are substitutes without end
        scenes.append(augmented(scene, augment, uniform))
        indices.append(index)
        replaced += int(index != wanted)
    pixels = _padded([scene.image.permute(1, 2, 0) for scene in scenes])
    height, width = pixels.shape[1:3]
    targets = [
        {
            "boxes": scene.boxes,
            "labels": scene.labels + 1,
            "masks": torch.nn.functional.pad(scene.masks, (0, width - scene.size[1], 0, height - scene.size[0])),
        }
        for scene in scenes
    ]
    sizes = [scene.size for scene in scenes]
    return _Made(pixels, sizes, targets, indices, [True] * len(scenes), reports, replaced)


def training_scene(images: CocoImages, index: int) -> Scene:
    """An image and its objects but for crowds, as they are on the disk. Raises BadImage."""
    if fault := images.fault(index):
        raise BadImage(images.name(index), fault)
    picture, (height, width) = decoded(images, index), images.size(index)
    found = images.objects(index)
    usable = is_usable(found.boxes, found.crowd, found.areas)
    try:
        masks = masks_of([part for part, take in zip(found.segmentations, usable, strict=True) if take], height, width)
    except ValueError as error:
        raise BadImage(images.name(index), f"an annotation's mask cannot be made: {error}") from error
    boxes = _corners(found, usable, height, width)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return Scene(
        torch.from_numpy(picture).permute(2, 0, 1),
        torch.from_numpy(boxes[inside]).float(),
        torch.from_numpy(found.labels[usable][inside]),
        torch.from_numpy(masks[inside]),
    )


def _corners(found: Objects, usable: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, 4) left, top, right, bottom, within the image."""
    boxes = found.boxes[usable]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return corners.clip(0, (width, height, width, height))


def _make_evaluation_batch(images: CocoImages, settings: CocoSettings, shares: Sequence[np.ndarray], n: int) -> _Made:
    reports: list[BadImage] = []
    taken = [
        first_usable([int(index)], partial(evaluated_pixels, images, settings), reports.append, _BLANK)
        for index in shares[n]
    ]
    pixels = [torch.from_numpy(found) for _, found in taken]
    sizes = [(int(of.shape[0]), int(of.shape[1])) for of in pixels]
    usable = [index is not None for index, _ in taken]
    return _Made(_padded(pixels), sizes, [], shares[n].tolist(), usable, reports)


def evaluated_pixels(images: CocoImages, settings: CocoSettings, index: int) -> np.ndarray:
    """(H, W, 3) uint8, resized. Raises BadImage."""
    return shown(decoded(images, index), settings)


def shown(pixels: np.ndarray, settings: CocoSettings) -> np.ndarray:
    """(H, W, 3) uint8 as an evaluation shows it, resized."""
    height, width = pixels.shape[:2]
    return resize(pixels, *fitted(height, width, settings.short_side, settings.longest), "bilinear")


def decoded(images: CocoImages, index: int) -> np.ndarray:
    """(H, W, 3) uint8, as its annotations see it: what a camera says of its turn is passed over, as COCO does.

    Raises:
        BadImage: it cannot be decoded, or has another size than it is annotated with.
    """
    encoded = read_image(images, index)
    try:
        image = open_image(encoded)
        image.load()
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # a decoder raises anything from OSError to struct.error
        raise BadImage(images.name(index), reason_of(error)) from error
    if pixels.shape[:2] != images.size(index):
        height, width = images.size(index)
        raise BadImage(
            images.name(index),
            f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels, and is annotated with {width} x {height}",
        )
    return pixels


def _padded(images: Sequence[Tensor]) -> Tensor:
    """(H, W, 3) uint8 each -> (B, H, W, 3), zeros beyond each, sides multiples of 32."""
    height, width = (-(-max(image.shape[axis] for image in images) // _STRIDE) * _STRIDE for axis in (0, 1))
    batch = torch.zeros(len(images), height, width, 3, dtype=torch.uint8)
    for place, image in zip(batch, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return batch

"""The two DALI pipelines, training and evaluation, each one definition for CPU and GPU.

An external source hands over encoded images and the numbers drawn for each; DALI decodes, crops, resizes, augments
and normalises. The graph holds no random operator and no reader, hence no state.
Evaluation gives the crop that timm's transform gives (resize in integers, centre rounded half to even).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch

from contextual_cnn.contracts import Batch
from contextual_cnn.data.augmentation import ATTEMPTS, Augmentation
from contextual_cnn.data.bad_images import BadImages
from contextual_cnn.data.on_device import augment, normalise
from contextual_cnn.data.randaugment.policy import fill_color
from contextual_cnn.data.resize import BatchResize
from contextual_cnn.data.sampler import TrainSampler, evaluation_batches
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings, Interpolation

try:
    from nvidia.dali import Pipeline, fn, pipeline_def, types
    from nvidia.dali import math as dali_math
    from nvidia.dali.data_node import DataNode

    from contextual_cnn.data.dali_feed import Feed
    from contextual_cnn.data.randaugment import dali_ops
except ImportError as error:
    raise UserError(
        f"NVIDIA DALI is not installed ({error})",
        "pip install nvidia-dali-cuda130 (CUDA 13, or no GPU) or nvidia-dali-cuda120 (`nvidia-dali` is a placeholder), "
        "or data.loader=torch",
    ) from error


# Types and dimensions of what the training source hands over
_CROP_INPUTS = [(types.UINT8, 1), (types.INT64, 0), *[(types.FLOAT, 1)] * 3]  # encoded image, target, crop
_FLIP_INPUT = (types.INT32, 0)
_INTERPOLATIONS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_BLANK = np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8)  # a black PPM, seen instead of an image that cannot be used


def train_batches(
    images: ImageSource,
    sampler: TrainSampler,
    augmentation: Augmentation,
    bad: BadImages,
    settings: DataSettings,
    device: torch.device,
) -> Iterator[Batch]:
    """One rank's endless batches; images (B, 3, size, size) float32 channels_last, targets (B,).

    Args:
        settings: randaugment_on "device" takes DALI's images as uint8 and augments and normalises them afterwards.
    """
    feed = _TrainFeed(images, sampler, augmentation, bad, settings, device)
    batches = feed.batches(device)
    return _finished_on_device(batches, sampler, augmentation, settings) if feed.finishes_on_device else batches


def _finished_on_device(
    batches: Iterator[Batch], sampler: TrainSampler, augmentation: Augmentation, settings: DataSettings
) -> Iterator[Batch]:
    """uint8 images as they were cropped -> what the other pipeline gives, by torch on the images' device."""
    for n, batch in enumerate(batches):
        draws, fill = augmentation.draw(sampler[n]), fill_color(settings.mean)
        pixels = augment(batch.images, draws, fill=fill, interpolation=augmentation.settings.interpolation)
        yield batch._replace(images=normalise(pixels, settings.mean, settings.std))


class EvaluationBatches:
    """One rank's share of a split, in passes that can be repeated; every image once over all ranks.

    The pipeline is built once. It runs ahead into the next pass, so that one starts with its first batches ready.
    """

    def __init__(self, images: ImageSource, bad: BadImages, settings: DataSettings, world: World) -> None:
        self.images = len(images)
        shares = list(evaluation_batches(len(images), settings.eval_batch_size, world.rank, world.size))
        self._batches_per_pass = len(shares)
        if shares:  # there may be more ranks than images
            self._batches = _EvaluationFeed(images, shares, bad, settings, world.device).batches(world.device)
        if shares and world.device.type == "cuda":  # now, and not when the training has taken all of its memory
            self._batches = chain([next(self._batches)], self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """One pass. It must be read to its end, or the next one starts in the middle."""
        for _ in range(self._batches_per_pass):
            yield next(self._batches)


class _TrainFeed(Feed):
    """The micro-batches of a sampler; a substitute takes the place of an image that cannot be used."""

    def __init__(
        self,
        images: ImageSource,
        sampler: TrainSampler,
        augmentation: Augmentation,
        bad: BadImages,
        settings: DataSettings,
        device: torch.device,
    ) -> None:
        super().__init__(images, bad)
        self._sampler, self._augmentation = sampler, augmentation
        self._settings, self._device = settings, device
        self.finishes_on_device = augmentation.policy is not None and settings.randaugment_on == "device"

    def indices(self, number: int) -> np.ndarray:
        return self._sampler[number].indices

    def candidates(self, number: int, i: int) -> Iterable[int]:
        return self._sampler.candidates(number, i)

    def decodes(self, encoded: list[np.ndarray], number: int, places: Sequence[int]) -> bool:
        draws = self._augmentation.draw(self._sampler[number])
        crops = [numbers[list(places)] for numbers in (draws.height, draws.width, draws.place)]
        return _runs(
            _crops_alone(
                lambda: (encoded, *crops),
                ratio=self._augmentation.settings.ratio,
                on=self._device.type,
                batch_size=len(encoded),
                **_executor(self._settings, self._device),
            )
        )

    def pipeline(self, first: int) -> Pipeline:
        policy, settings = self._augmentation.policy, self._settings
        return _train_pipeline(
            lambda info: self._inputs(first + info.iteration),
            settings,
            self._augmentation.settings,
            layers=policy.layers if policy is not None else 0,
            crops_alone=self.finishes_on_device,
            on=self._device.type,
            batch_size=self._sampler.plan.micro_batch,
            **_executor(settings, self._device),
        )

    def _inputs(self, number: int) -> tuple:
        """What the pipeline's source hands over."""
        draws = self._augmentation.draw(self._sampler[number])
        crop = (*self.encoded(number), draws.height, draws.width, draws.place)
        if self.finishes_on_device:
            return crop
        ops = dali_ops.inputs(draws.ops, self._settings.image_size) if draws.ops is not None else ()
        return (*crop, draws.flip, *ops)


class _EvaluationFeed(Feed):
    """One rank's share of a split, pass after pass; a blank takes the place of an image that cannot be used."""

    blank = _BLANK

    def __init__(
        self,
        images: ImageSource,
        shares: Sequence[np.ndarray],
        bad: BadImages,
        settings: DataSettings,
        device: torch.device,
    ) -> None:
        super().__init__(images, bad)
        self._shares, self._settings, self._device = shares, settings, device

    def indices(self, number: int) -> np.ndarray:
        return self._shares[number % len(self._shares)]

    def candidates(self, number: int, i: int) -> Iterable[int]:
        return [int(self.indices(number)[i])]

    def decodes(self, encoded: list[np.ndarray], number: int, places: Sequence[int]) -> bool:
        executor = _executor(self._settings, self._device)
        return _runs(_decoder_alone(lambda: encoded, on=self._device.type, batch_size=len(encoded), **executor))

    def pipeline(self, first: int) -> Pipeline:
        return _evaluation_pipeline(
            lambda info: self.encoded(first + info.iteration),
            self._settings,
            on=self._device.type,
            batch_size=self._settings.eval_batch_size,
            **_executor(self._settings, self._device),
        )


@pipeline_def(enable_conditionals=True)
def _train_pipeline(
    source: Callable,
    settings: DataSettings,
    augment: AugmentSettings,
    *,
    layers: int,
    crops_alone: bool,
    on: str,
) -> tuple[DataNode, DataNode]:
    """With `crops_alone` the images stay uint8, neither augmented nor flipped."""
    inputs = list(_CROP_INPUTS)
    if not crops_alone:
        inputs += [_FLIP_INPUT, *(dali_ops.INPUTS if layers else ())]
    encoded, target, heights, widths, place, *drawn = fn.external_source(
        source,
        num_outputs=len(inputs),
        batch=True,
        batch_info=True,
        dtype=[dtype for dtype, _ in inputs],
        ndim=[ndim for _, ndim in inputs],
    )
    size = settings.image_size
    images = _decode_crop(encoded, heights, widths, place, augment.ratio, on)
    images = _resize(images, types.Constant([size, size], dtype=types.FLOAT), settings.interpolation, on)
    if not crops_alone:
        flip, *ops = drawn
        if layers:
            fill = fill_color(settings.mean)
            images = dali_ops.apply_ops(
                images, ops, layers, size=size, fill=fill, interpolation=augment.interpolation, on=on
            )
        images = fn.crop_mirror_normalize(images, mirror=flip, **_normalise_arguments(settings))
    return images, target


@pipeline_def
def _evaluation_pipeline(source: Callable, settings: DataSettings, *, on: str) -> tuple[DataNode, DataNode]:
    encoded, target = fn.external_source(
        source, num_outputs=2, batch=True, batch_info=True, dtype=[types.UINT8, types.INT64], ndim=[1, 0]
    )
    height, width = _size_of(encoded)
    # torchvision truncates the longer side to an integer; DALI's own resize_shorter keeps its fraction
    size, resize_size = settings.image_size, int(settings.image_size / settings.crop_pct)
    shorter = dali_math.min(height, width)
    resized = [dali_math.floor(side * float(resize_size) / shorter) for side in (height, width)]
    start = [_half_to_even(side - float(size)) for side in resized]
    images = fn.decoders.image(encoded, **_decoder_arguments(on))
    images = _resize(images, fn.stack(*resized), settings.interpolation, on)
    images = fn.slice(
        images,
        start=fn.cast(fn.stack(*start), dtype=types.INT32),
        shape=[size, size],
        axis_names="HW",
    )
    return fn.crop_mirror_normalize(images, **_normalise_arguments(settings)), target


@pipeline_def
def _crops_alone(source: Callable, *, ratio: Sequence[float], on: str) -> DataNode:
    """What of the training's pipeline depends on an image's bytes."""
    encoded, heights, widths, place = fn.external_source(
        source,
        num_outputs=4,
        batch=True,
        dtype=[types.UINT8, *[types.FLOAT] * 3],
        ndim=[1] * 4,
    )
    return _decode_crop(encoded, heights, widths, place, ratio, on)


@pipeline_def
def _decoder_alone(source: Callable, *, on: str) -> tuple[DataNode, DataNode]:
    """What of the evaluation's pipeline depends on an image's bytes."""
    encoded = fn.external_source(source, batch=True, dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, **_decoder_arguments(on)), fn.peek_image_shape(encoded, adjust_orientation=False)


def _runs(pipeline: Pipeline) -> bool:
    try:
        pipeline.build()
        pipeline.run()
    except RuntimeError:
        return False
    return True


def _decode_crop(
    encoded: DataNode, heights: DataNode, widths: DataNode, place: DataNode, ratio: Sequence[float], on: str
) -> DataNode:
    height, width = _size_of(encoded)
    anchor, shape = _random_crop(height, width, heights, widths, place, ratio)
    return fn.decoders.image_slice(
        encoded,
        anchor,
        shape,
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        **_decoder_arguments(on),
    )


def _random_crop(
    height: DataNode, width: DataNode, heights: DataNode, widths: DataNode, place: DataNode, ratio: Sequence[float]
) -> tuple[DataNode, DataNode]:
    """timm's RandomResizedCrop: the first of ten attempts that fits, else the largest central crop within `ratio`.

    Args:
        height, width: of the image. heights, widths, place: see `augmentation.Draws`.

    Returns:
        anchor (row, column) and shape (height, width), int32.
    """
    side = dali_math.sqrt(height * width)
    crop_heights, crop_widths = (dali_math.floor(side * sides + 0.5) for sides in (heights, widths))
    # The smaller side is at least one pixel: 0 can come up in images of a few pixels only
    fits = (dali_math.min(crop_heights, crop_widths) > 0.0) & (crop_heights <= height) & (crop_widths <= width)
    fits = fn.cast(fits, dtype=types.FLOAT)
    # The earliest attempt that fits has the highest score, and no two attempts have the same
    score = fits * types.Constant(np.arange(ATTEMPTS, 0, -1, dtype=np.float32))
    best = fn.reductions.max(score, axes=0)
    first = fn.cast(score == best, dtype=types.FLOAT)
    any_fits = fn.cast(best > 0.0, dtype=types.FLOAT)

    def choose(attempt: DataNode, fallback: DataNode) -> DataNode:
        return any_fits * attempt + (1.0 - any_fits) * fallback

    crop_height = choose(
        fn.reductions.sum(first * crop_heights, axes=0),
        dali_math.min(height, dali_math.floor(width / ratio[0] + 0.5)),
    )
    crop_width = choose(
        fn.reductions.sum(first * crop_widths, axes=0),
        dali_math.min(width, dali_math.floor(height * ratio[1] + 0.5)),
    )
    room = (height - crop_height, width - crop_width)
    # min: float32 may round place * (room + 1) up to room + 1
    anchor = [
        choose(
            dali_math.min(dali_math.floor(place[i] * (room[i] + 1.0)), room[i]),
            dali_math.floor(room[i] * 0.5),
        )
        for i in range(2)
    ]
    return fn.cast(fn.stack(*anchor), dtype=types.INT32), fn.cast(fn.stack(crop_height, crop_width), dtype=types.INT32)


def _resize(images: DataNode, size: DataNode, interpolation: Interpolation, on: str) -> DataNode:
    """Antialiased. DALI's own takes a CPU five times as long, and is further away from Pillow.

    Args:
        size: height and width, whole numbers as float32.
    """
    if on == "cuda":
        resized = fn.resize(images, size=size, interp_type=_INTERPOLATIONS[interpolation], subpixel_scale=False)
        assert isinstance(resized, DataNode)  # as it is of one input
        return resized
    size = fn.cast(size, dtype=types.INT32)
    by_threads = BatchResize(Pipeline.current().num_threads, interpolation)
    flat = fn.python_function(images, size, function=by_threads, batch_processing=True)
    return fn.reshape(flat, shape=fn.cat(size, types.Constant([3], dtype=types.INT32)), layout="HWC")


def _size_of(encoded: DataNode) -> tuple[DataNode, DataNode]:
    """Height and width as float32, from the header."""
    shape = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False), dtype=types.FLOAT)
    return shape[0], shape[1]


def _half_to_even(room: DataNode) -> DataNode:
    """round(room / 2) as Python and torchvision round: x.5 to the even neighbour."""
    half = dali_math.floor(room * 0.5)
    is_half = room * 0.5 - half  # 0 or 0.5
    is_odd = half - 2.0 * dali_math.floor(half * 0.5)  # 0 or 1
    return half + 2.0 * is_half * is_odd


def _decoder_arguments(on: str) -> dict:
    """PIL's pixels: no turn by EXIF, and on a GPU the chroma upsampling that libjpeg does."""
    arguments = dict(output_type=types.RGB, adjust_orientation=False, device="mixed" if on == "cuda" else "cpu")
    return arguments | {"jpeg_fancy_upsampling": True} if on == "cuda" else arguments


def _normalise_arguments(settings: DataSettings) -> dict:
    """HWC out: the (B, C, H, W) view of it is channels_last without a copy."""
    return dict(
        mean=[255 * value for value in settings.mean],
        std=[255 * value for value in settings.std],
        output_layout="HWC",
        dtype=types.FLOAT,
    )


def _executor(settings: DataSettings, device: torch.device) -> dict:
    return dict(
        num_threads=settings.threads,
        # None, not -1: the CPU pipelines need no driver
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=settings.prefetch,
    )

"""The two DALI pipelines, training and evaluation, each one definition for CPU and GPU.

An external source hands over encoded images and the numbers drawn for each; DALI decodes, crops, resizes, augments
and normalises. The graph holds no random operator and no reader, hence no state.
Evaluation gives the crop that timm's transform gives (resize in integers, centre rounded half to even).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from contextual_cnn.contracts import Batch
from contextual_cnn.data.augmentation import ATTEMPTS, Augmentation, draw
from contextual_cnn.data.bad_images import BadImages, blank_if_bad, first_usable
from contextual_cnn.data.on_device import augment, normalise
from contextual_cnn.data.randaugment.policy import fill_color
from contextual_cnn.data.resize import BatchResize, Interpolation
from contextual_cnn.data.sampler import TrainSampler, evaluation_batches
from contextual_cnn.data.sources import ImageSource
from contextual_cnn.errors import UserError

try:
    from nvidia.dali import Pipeline, fn, pipeline_def, types
    from nvidia.dali import math as dali_math
    from nvidia.dali.data_node import DataNode

    from contextual_cnn.data.dali_feed import Feed
    from contextual_cnn.data.dali_feed import batches as feed_batches
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
    *,
    image_size: int,
    interpolation: Interpolation,
    mean: Sequence[float],
    std: Sequence[float],
    threads: int,
    prefetch: int,
    randaugment_on: Literal["loader", "device"],
    device: torch.device,
) -> Iterator[Batch]:
    """One rank's endless batches; images (B, 3, size, size) float32 channels_last, targets (B,).

    Args:
        randaugment_on: "device" takes DALI's images as uint8 and augments and normalises them afterwards.
    """
    policy = augmentation.policy
    on_device = policy is not None and randaugment_on == "device"
    executor = _executor(threads, prefetch, device)

    def decodes(encoded: list[np.ndarray], n: int, places: Sequence[int]) -> bool:
        draws = draw(augmentation, sampler.seed, sampler[n])
        crops = [numbers[list(places)] for numbers in (draws.height, draws.width, draws.place)]
        pipeline = _crops_alone(
            lambda: (encoded, *crops), ratio=augmentation.ratio, on=device.type, batch_size=len(encoded), **executor
        )
        return _runs(pipeline)

    feed = Feed(
        images,
        indices_of=lambda n: sampler[n].indices,
        fill=lambda n, i, use: first_usable(sampler.candidates(n, i), use, bad.report),
        decodes=decodes,
    )

    def build(first: int) -> Pipeline:
        def source(info: types.BatchInfo) -> tuple:
            n = first + info.iteration
            draws = draw(augmentation, sampler.seed, sampler[n])
            crop = (*feed[n], draws.height, draws.width, draws.place)
            if on_device:
                return crop
            return (*crop, draws.flip, *(dali_ops.inputs(draws.ops, image_size) if draws.ops is not None else ()))

        return _train_pipeline(
            source,
            ratio=augmentation.ratio,
            image_size=image_size,
            layers=policy.layers if policy is not None else 0,
            fill=fill_color(mean),
            interpolation=interpolation,
            ops_interpolation=augmentation.interpolation,
            normalisation=_normalise_arguments(mean, std) if not on_device else None,
            on=device.type,
            batch_size=sampler.plan.micro_batch,
            **executor,
        )

    for n, (batch, replaced) in enumerate(feed_batches(feed, build, device)):
        bad.replaced += replaced
        yield _finish_on_device(batch, n, sampler, augmentation, mean, std) if on_device else batch


class EvaluationBatches:
    """One rank's share of a split, in passes that can be repeated; every image once over all ranks.

    The pipeline is built once. It runs ahead into the next pass, so that one starts with its first batches ready.
    """

    def __init__(
        self,
        images: ImageSource,
        bad: BadImages,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        image_size: int,
        crop_pct: float,
        interpolation: Interpolation,
        mean: Sequence[float],
        std: Sequence[float],
        threads: int,
        prefetch: int,
        device: torch.device,
    ) -> None:
        self.images = len(images)
        shares = list(evaluation_batches(len(images), batch_size, rank, world_size))
        self._batches_per_pass = len(shares)
        if not shares:  # more ranks than images
            return

        executor = _executor(threads, prefetch, device)

        def indices_of(number: int) -> np.ndarray:
            return shares[number % len(shares)]

        feed = Feed(
            images,
            indices_of=indices_of,
            fill=lambda number, i, use: blank_if_bad(int(indices_of(number)[i]), use, _BLANK, bad.report),
            decodes=lambda encoded, *_: _runs(
                _decoder_alone(lambda: encoded, on=device.type, batch_size=len(encoded), **executor)
            ),
        )

        def build(first: int) -> Pipeline:
            return _evaluation_pipeline(
                lambda info: feed[first + info.iteration],
                image_size=image_size,
                resize_size=int(image_size / crop_pct),
                interpolation=interpolation,
                normalisation=_normalise_arguments(mean, std),
                on=device.type,
                batch_size=batch_size,
                **executor,
            )

        self._batches = feed_batches(feed, build, device)

    def __iter__(self) -> Iterator[Batch]:
        """One pass. It must be read to its end, or the next one starts in the middle."""
        for _ in range(self._batches_per_pass):
            batch, _ = next(self._batches)
            yield batch


@pipeline_def(enable_conditionals=True)
def _train_pipeline(
    source: Callable,
    *,
    ratio: Sequence[float],
    image_size: int,
    layers: int,
    fill: tuple[int, ...],
    interpolation: Interpolation,
    ops_interpolation: str,
    normalisation: dict | None,
    on: str,
) -> tuple[DataNode, DataNode]:
    """Without `normalisation` the images stay uint8, neither augmented nor flipped."""
    inputs = list(_CROP_INPUTS)
    if normalisation is not None:
        inputs += [_FLIP_INPUT, *(dali_ops.INPUTS if layers else ())]
    encoded, target, heights, widths, place, *drawn = fn.external_source(
        source,
        num_outputs=len(inputs),
        batch=True,
        batch_info=True,
        dtype=[dtype for dtype, _ in inputs],
        ndim=[ndim for _, ndim in inputs],
    )
    images = _decode_crop(encoded, heights, widths, place, ratio, on)
    images = _resize(images, types.Constant([image_size, image_size], dtype=types.FLOAT), interpolation, on)
    if normalisation is not None:
        flip, *ops = drawn
        if layers:
            images = dali_ops.apply_ops(
                images, ops, layers, size=image_size, fill=fill, interpolation=ops_interpolation, on=on
            )
        images = fn.crop_mirror_normalize(images, mirror=flip, **normalisation)
    return images, target


def _finish_on_device(
    batch: Batch,
    n: int,
    sampler: TrainSampler,
    augmentation: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
) -> Batch:
    """uint8 images as they were cropped -> what the other pipeline gives, by torch on the images' device."""
    draws = draw(augmentation, sampler.seed, sampler[n])
    images = augment(batch.images, draws, fill=fill_color(mean), interpolation=augmentation.interpolation)
    return Batch(normalise(images, mean, std), batch.targets)


@pipeline_def
def _evaluation_pipeline(
    source: Callable, *, image_size: int, resize_size: int, interpolation: Interpolation, normalisation: dict, on: str
) -> tuple[DataNode, DataNode]:
    encoded, target = fn.external_source(
        source, num_outputs=2, batch=True, batch_info=True, dtype=[types.UINT8, types.INT64], ndim=[1, 0]
    )
    height, width = _size_of(encoded)
    # torchvision truncates the longer side to an integer; DALI's own resize_shorter keeps its fraction
    shorter = dali_math.min(height, width)
    resized = [dali_math.floor(side * float(resize_size) / shorter) for side in (height, width)]
    start = [_half_to_even(side - float(image_size)) for side in resized]
    images = fn.decoders.image(encoded, **_decoder_arguments(on))
    images = _resize(images, fn.stack(*resized), interpolation, on)
    images = fn.slice(
        images,
        start=fn.cast(fn.stack(*start), dtype=types.INT32),
        shape=[image_size, image_size],
        axis_names="HW",
    )
    return fn.crop_mirror_normalize(images, **normalisation), target


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


def _normalise_arguments(mean: Sequence[float], std: Sequence[float]) -> dict:
    """HWC out: the (B, C, H, W) view of it is channels_last without a copy."""
    return dict(
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
        output_layout="HWC",
        dtype=types.FLOAT,
    )


def _executor(threads: int, prefetch: int, device: torch.device) -> dict:
    return dict(
        num_threads=threads,
        # None, not -1: the CPU pipelines need no driver
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
    )

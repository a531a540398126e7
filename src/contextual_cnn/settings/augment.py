"""The keys of conf/augment/: what is done to an image before it is a training sample."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from contextual_cnn.errors import UserError


class RandAugmentNumbers(NamedTuple):
    """layers: operations drawn for an image. magnitude: 0 to 10. magnitude_std: of the Gaussian noise on it.

    probability: that an operation is applied.
    """

    layers: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    probability: float = 0.5


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """The recipe's numbers; the defaults are ConvNeXt's.

    scale, ratio: random resized crop, share of the area and range of the aspect ratio.
    hflip: probability of a horizontal flip.
    randaugment: in timm's notation, `rand-m9-mstd0.5-inc1`; None is off.
    interpolation: of RandAugment's geometry; timm's recipe is bicubic, bilinear is the cheaper default.
    color_jitter: largest change of brightness, contrast and saturation; as in timm it means nothing beside RandAugment.
    erasing: probability that a sample has a rectangle replaced by noise (timm's RandomErasing, per pixel).
    mixup, cutmix: alpha of the Beta distribution; 0 turns one off. mix_prob, mix_switch_prob, mix_mode: as timm's Mixup
        (one share for the whole batch, for each pair of images, or for each image).
    label_smoothing: share of the target spread over all classes.
    """

    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    color_jitter: float = 0.4
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.randaugment is not None:
            parse_randaugment(self.randaugment)
        if not 0 <= self.color_jitter < math.inf:
            raise UserError(f"augment.color_jitter is 0 or more, got {self.color_jitter}", "augment.color_jitter=0")
        for key in ("hflip", "erasing", "mix_prob", "mix_switch_prob", "label_smoothing"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(
                    f"augment.{key} is a share between 0 and 1, got {getattr(self, key)}",
                    f"augment.{key}=0 turns it off",
                )
        for key in ("mixup", "cutmix"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(
                    f"augment.{key} is 0 or more, got {getattr(self, key)}", f"augment.{key}=0 turns it off"
                )
        for key in ("scale", "ratio"):
            low_high = getattr(self, key)
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] < math.inf:
                raise UserError(
                    f"augment.{key} is [low, high] with 0 < low <= high, got {list(low_high)}",
                    f"augment.{key}=[0.5,1.0]",
                )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of their micro-batch."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def check_micro_batch(self, size: int) -> None:
        """Raises UserError for a micro-batch that cannot be mixed: an image is mixed with its mirror place."""
        if (self.mixes or self.label_smoothing) and size % 2:
            raise UserError(
                f"mixing needs an even micro-batch, got {size}",
                f"trainer.micro_batch_size={size + 1}, or augment=none",
            )


def parse_randaugment(text: str) -> RandAugmentNumbers:
    """Reads timm's notation, `rand-m9-mstd0.5-inc1`, with timm's defaults for what is left out.

    Raises:
        UserError: a section that is unknown or not supported.
    """
    given = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "inc": 0.0}
    name, *sections = text.split("-")
    for section in sections:
        matched = re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", section)
        if matched is None:
            raise _refusal(f"cannot read {section!r} in {text!r}; the sections are m, n, p, mstd and inc")
        given[matched[1]] = float(matched[2])
    if name != "rand" or given["inc"] != 1:
        raise _refusal(f"{text!r}: only RandAugment with increasing severity (rand-...-inc1) is supported")
    if given["n"] < 1 or given["n"] % 1 or given["m"] > 10 or given["p"] > 1 or given["mstd"] > 100:
        raise _refusal(f"{text!r}: n is a whole number from 1 on, m at most 10, p at most 1, mstd at most 100")
    return RandAugmentNumbers(int(given["n"]), given["m"], given["mstd"], given["p"])


def _refusal(cause: str) -> UserError:
    return UserError(f"augment.randaugment: {cause}", "augment.randaugment=rand-m9-mstd0.5-inc1, or null for none")

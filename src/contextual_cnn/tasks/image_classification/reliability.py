"""How far an accuracy can be trusted, and how far a model's own confidence can."""

import math

import torch
from torch import Tensor

_Z = 1.959963984540054  # the standard normal's 97.5 % quantile: a 95 % interval


def wilson_interval(hits: int, images: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, both ends in 0..1 (Wilson, 1927).

    With p = hits / images, n = images:

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    It says how far another draw of as many images would lie, and nothing of another seed of the training.
    """
    share, z2 = hits / images, _Z**2 / images
    half = _Z * math.sqrt(share * (1 - share) / images + z2 / (4 * images))
    return max(0.0, (share + z2 / 2 - half) / (1 + z2)), min(1.0, (share + z2 / 2 + half) / (1 + z2))


def expected_calibration_error(confidences: Tensor, hits: Tensor, bins: int = 15) -> float:
    """The gap between confidence and accuracy, in 0..1 (Guo et al., On Calibration of Modern Neural Networks, 2017).

    The images fall into bins of equal width by the probability of their first class, bin m holds ((m - 1)/M, m/M]:

        ECE = sum over m of |B_m| / n * |accuracy(B_m) - mean confidence(B_m)|

    Args:
        confidences: (N,) in 0..1. A NaN makes the result one.
        hits: (N,) bool.
    """
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    confidences = confidences.double().contiguous()  # a column of a table is not, and bucketize would warn
    bin_of = torch.bucketize(confidences, edges)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, hits.double() - confidences)
    return (gaps.abs().sum() / len(hits)).item()

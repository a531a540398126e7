"""Intervals and calibration beside slow, obvious twins."""

import math

import pytest
import torch

from contextual_cnn.tasks.image_classification.reliability import expected_calibration_error, wilson_interval


@pytest.mark.parametrize(("hits", "images"), [(41_050, 50_000), (1, 3), (7, 18)])
def test_the_interval_holds_the_shares_that_a_test_would_not_reject(hits, images):
    """Its ends solve |share - p| = z sqrt(p (1 - p) / n); found here by bisection, away from the closed formula."""
    share, z = hits / images, 1.959963984540054

    def is_rejected(p):
        return abs(share - p) > z * math.sqrt(p * (1 - p) / images)

    def bisect(rejected, accepted):
        for _ in range(80):
            middle = (rejected + accepted) / 2
            rejected, accepted = (middle, accepted) if is_rejected(middle) else (rejected, middle)
        return accepted

    low, high = wilson_interval(hits, images)
    assert low == pytest.approx(bisect(0.0, share), abs=1e-9)
    assert high == pytest.approx(bisect(1.0, share), abs=1e-9)


def test_the_interval_by_hand():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def calibration_by_loop(confidences, hits, bins):
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidences) if (m - 1) / bins < c <= m / bins or (c == 0 and m == 1)]
        if inside:
            accuracy = sum(hits[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_calibration_error_is_that_of_the_loop(bins):
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    confidences = torch.cat([torch.rand(300, dtype=torch.float64), edges])
    hits = torch.rand(len(confidences), dtype=torch.float64) < confidences**2
    expected = calibration_by_loop(confidences.tolist(), hits.tolist(), bins)
    assert expected_calibration_error(confidences, hits, bins) == pytest.approx(expected, abs=1e-12)
    assert expected > 0.05


def test_the_calibration_error_by_hand():
    """(0.6, hit) and (0.64, no hit) share bin 10 of 15: |1 - 1.24| / 4; 0.9 and 1.0, both hit, are alone."""
    confidences, hits = torch.tensor([0.6001, 0.64, 0.9, 1.0]), torch.tensor([True, False, True, True])
    assert expected_calibration_error(confidences, hits) == pytest.approx((0.2401 + 0.1 + 0.0) / 4, abs=1e-6)
    assert math.isnan(expected_calibration_error(torch.tensor([math.nan, 0.5]), torch.tensor([True, True])))

"""Exported convolutions against the ones that they stand for."""

import pytest
import torch
from torch.testing import assert_close

from contextual_cnn.ops import contextual_conv2d
from contextual_cnn.ops.standard_operators import decompositions


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("parts", ["offset", "mask", "offset and mask"])
def test_the_standard_operators_compute_the_same(dense, parts):
    """Of every form of the convolution; positions far outside the map included, whole pixels too."""

    class Layer(torch.nn.Module):
        def forward(self, x, weight, weight_offset, offset, mask):
            return contextual_conv2d(
                x,
                weight,
                weight_offset=weight_offset,
                sampling_offset=offset,
                mask=mask,
                stride=2,
                padding=2,
                dilation=2,
            )

    weight = torch.randn(6 if dense else 4, 4 if dense else 1, 3, 3)
    offset = torch.randn(2, 18, 5, 4) * 4 if "offset" in parts else None
    if offset is not None:
        offset[0, :9] = offset[0, :9].round()
        offset[1, 0] = 1e6
    mask = torch.rand(2, 9, 5, 4) if "mask" in parts else None
    inputs = (torch.randn(2, 4, 9, 8), weight, torch.randn(2, 4, 3, 3), offset, mask)
    exported = torch.export.export(Layer(), inputs).run_decompositions(decompositions())
    assert not any("sampled" in str(n.target) or "deform" in str(n.target) for n in exported.graph.nodes)
    assert_close(exported.module()(*inputs), Layer()(*inputs), rtol=1e-4, atol=1e-4)

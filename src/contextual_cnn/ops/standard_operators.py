"""The sampled convolutions in standard operators, for programs that run without this package (torch.export, ONNX).

Sampling is one `grid_sample`, which ONNX and its runtimes know. Its normalised coordinates round a position in
pixels by about 1e-7 of the map: nothing for a value, but too much for an offset's gradient at whole pixels
(sampled_conv_torch.py). So this form is for inference only.

Shapes: B samples, C channels, H W map, P = Ho Wo positions, K taps, O output channels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.ops import deform_conv2d  # noqa: F401 - declares torch.ops.torchvision.deform_conv2d

from contextual_cnn.ops.memory_format import output_shape
from contextual_cnn.ops.sampled_conv import kernel  # noqa: F401 - declares torch.ops.contextual_cnn.sampled_conv2d
from contextual_cnn.ops.sampled_conv_torch import regular_grid


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """For `ExportedProgram.run_decompositions`."""
    return {
        torch.ops.contextual_cnn.sampled_conv2d.default: _depthwise,
        torch.ops.torchvision.deform_conv2d.default: _dense,
    }


def _depthwise(
    x: Tensor, weight: Tensor, offset: Tensor | None, mask: Tensor | None, geometry: Sequence[int], wanted: str
) -> Tensor:
    """contextual_cnn::sampled_conv2d: (B, C, H, W) and (B, C, kh, kw) -> (B, C, Ho, Wo)."""
    out = output_shape(offset, mask)
    samples = _sample(x, weight.shape[2:], out, offset, mask, geometry)  # (B, C, P, K)
    y = samples @ weight.to(samples.dtype).flatten(2).unsqueeze(-1)
    return y.squeeze(-1).unflatten(2, out).to(x.dtype)


def _dense(
    x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor,
    sh: int, sw: int, ph: int, pw: int, dh: int, dw: int, groups: int, offset_groups: int, use_mask: bool,
) -> Tensor:  # fmt: skip
    """torchvision::deform_conv2d as `contextual_conv2d` calls it: one group, square geometry."""
    out = offset.shape[2:]
    samples = _sample(x, weight.shape[2:], out, offset, mask if use_mask else None, (sh, ph, dh))
    columns = samples.permute(0, 1, 3, 2).flatten(1, 2)  # (B, C K, P)
    y = weight.flatten(1) @ columns + bias.unsqueeze(-1)
    return y.unflatten(2, out)


def _sample(
    x: Tensor,
    kernel_size: Sequence[int],
    out: Sequence[int],
    offset: Tensor | None,
    mask: Tensor | None,
    geometry: Sequence[int],
) -> Tensor:
    """The map at every position and tap, times the mask: (B, C, P, K) in float32 at least."""
    exact = torch.promote_types(x.dtype, torch.float32)
    height, width = x.shape[2:]
    rows, columns = (t.to(exact).expand(x.shape[0], -1, -1) for t in regular_grid(kernel_size, out, geometry, x.device))
    if offset is not None:
        shift = offset.to(exact).unflatten(1, (-1, 2)).permute(0, 3, 4, 1, 2).flatten(1, 2)  # (B, P, K, 2)
        rows, columns = rows + shift[..., 0], columns + shift[..., 1]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)  # x before y
    samples = grid_sample(x.to(exact), grid, align_corners=False)
    return samples if mask is None else samples * mask.to(exact).flatten(2).transpose(1, 2).unsqueeze(1)

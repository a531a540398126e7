"""The depthwise convolution: the Triton kernels in the interpreter (on a GPU where there is one), and torch's own."""

import pytest
import torch
from torch.nn.functional import conv2d

from contextual_cnn.ops import depthwise_conv, depthwise_conv2d, depthwise_conv_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# batch, channels, height, width, kernel, padding
CASES = {
    "as in ConvNeXt": (2, 96, 7, 7, 7, 3),
    "channels that fill no block": (2, 98, 5, 6, 7, 3),
    "rows in fours": (1, 64, 8, 5, 7, 3),
    "more rows than a program makes": (1, 32, 9, 4, 3, 1),
    "no padding": (2, 5, 4, 6, 3, 0),
    "one number": (1, 1, 1, 1, 1, 0),
    "map smaller than the kernel": (3, 6, 2, 1, 5, 2),
}


def inputs(batch, channels, height, width, kernel, padding, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=g).to(dtype)
    weight, bias = torch.randn(channels, 1, kernel, kernel, generator=g), torch.randn(channels, generator=g)
    out = [size + 2 * padding - kernel + 1 for size in (height, width)]
    return (x, weight, bias), torch.randn(batch, channels, *out, generator=g).to(dtype), padding


def computed(tensors, upstream, padding, **options):
    """y and every gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = depthwise_conv2d(*leaves, padding=padding, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def exactly(tensors, upstream, padding):
    leaves = [t.double().requires_grad_() for t in tensors]
    y = conv2d(*leaves, padding=padding, groups=len(leaves[1]))
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.double())]


def relative_errors(found, exact):
    return [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_forward_and_every_gradient(case):
    tensors, upstream, padding = inputs(*CASES[case])
    on_device = [t.to(DEVICE) for t in tensors]
    found = computed(on_device, upstream.to(DEVICE), padding, implementation="triton")
    assert max(relative_errors(found, exactly(tensors, upstream, padding))) < 1e-6
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_a_low_map_can_have_an_exact_result(implementation):
    """Offsets of a bfloat16 map are float32; the other way about only the result is rounded."""
    tensors, upstream, padding = inputs(2, 16, 5, 5, 7, 3, dtype=torch.bfloat16)
    exact = exactly(tensors, upstream, padding)
    on_device = [t.to(DEVICE) for t in tensors]
    options = dict(implementation=implementation, dtype=torch.float32)
    y, gx, *others = computed(on_device, upstream.to(DEVICE), padding, **options)
    assert (y.dtype, gx.dtype) == (torch.float32, torch.bfloat16)
    assert max(relative_errors((y, *others), (exact[0], *exact[2:]))) < 1e-6
    low = depthwise_conv2d(*on_device, padding=padding, implementation=implementation)
    assert low.dtype == torch.bfloat16
    assert max(relative_errors([low], [y.cpu().double()])) < 5e-3  # torch's own rounds the weight, too


def test_the_operator_and_the_way_around_it_give_the_same_bits():
    tensors, _, padding = inputs(*CASES["channels that fill no block"])
    leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
    results = []
    for compute in (depthwise_conv.kernel, depthwise_conv._Function.apply):
        y = compute(*leaves, padding, torch.float32)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_operator_keeps_torchs_rules():
    tensors, _, padding = inputs(*CASES["as in ConvNeXt"])
    leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
    torch.library.opcheck(depthwise_conv.kernel, (*leaves, padding, torch.float32))


def test_a_frozen_weight_costs_no_gradient(monkeypatch):
    (x, weight, bias), _, padding = inputs(*CASES["rows in fours"])
    monkeypatch.setattr(depthwise_conv_triton, "weight_gradient", None)
    leaf = x.to(DEVICE).requires_grad_()
    y = depthwise_conv2d(leaf, weight.to(DEVICE), bias.to(DEVICE), padding=padding, implementation="triton")
    y.sum().backward()
    assert leaf.grad.shape == x.shape


def test_the_same_bits_every_time():
    tensors, upstream, padding = inputs(*CASES["as in ConvNeXt"])
    on_device = [t.to(DEVICE) for t in tensors]
    runs = [computed(on_device, upstream.to(DEVICE), padding, implementation="triton") for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_on_a_cpu_it_is_torchs_own_bits():
    (x, weight, bias), _, padding = inputs(*CASES["channels that fill no block"])
    y = depthwise_conv2d(x, weight, bias, padding=padding)
    assert torch.equal(y, conv2d(x, weight, bias, padding=padding, groups=98))

"""The Triton kernels: run in the interpreter on odd shapes (on a GPU where there is one), compiled for sm_90."""

import json
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextual_cnn.ops import (
    contextual_conv2d,
    depthwise_conv_triton,
    sampled_conv,
    sampled_conv_torch,
    sampled_conv_triton,
)
from tests.conftest import run_python
from tests.helpers import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# batch, channels, height, width, kernel, stride, padding, dilation, offsets' spread in pixels, mask
CASES = {
    "small": (2, 3, 4, 5, 3, 1, 1, 1, 1.0, True),
    "more channels than a block": (1, 70, 3, 4, 3, 1, 1, 1, 3.0, False),
    "stride and dilation": (2, 3, 7, 6, 3, 2, 2, 2, 1.0, True),
    "fresh layer, whole pixels": (1, 3, 5, 6, 3, 1, 1, 1, 0.0, False),
    "mask alone": (1, 4, 4, 3, 3, 1, 1, 1, None, True),
    "far outside": (1, 3, 4, 4, 3, 1, 1, 1, 40.0, True),
    "map smaller than the kernel": (1, 3, 1, 2, 5, 1, 2, 1, 1.0, False),
    "more pixels than a block": (1, 3, 8, 9, 3, 1, 1, 1, 2.0, False),
}
# Too many numbers for a loop in Python; plain torch gives what the loop gives: test_contextual_conv.py
LARGE = ("more channels than a block", "more pixels than a block")


def inputs(batch, channels, height, width, kernel, stride, padding, dilation, spread, with_mask):
    g = torch.Generator().manual_seed(0)
    out = [(size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for size in (height, width)]
    x = torch.randn(batch, channels, height, width, generator=g)
    weight = torch.randn(batch, channels, kernel, kernel, generator=g)
    offset = spread * torch.randn(batch, 2 * kernel**2, *out, generator=g) if spread is not None else None
    mask = torch.rand(batch, kernel**2, *out, generator=g) if with_mask else None
    upstream = torch.randn(batch, channels, *out, generator=g)
    return (x, weight, offset, mask), upstream, (stride, padding, dilation)


def expected(tensors, upstream, geometry, large):
    """y and the gradients of what is there in float64, by the slow loop or by plain torch."""
    leaves = [t.double().requires_grad_() if t is not None else None for t in tensors]
    y = sampled_conv_torch.forward(*leaves, geometry) if large else by_loop(*leaves, upstream.shape[2:], geometry)
    return y.detach(), torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], upstream.double())


def by_loop(x, weight, offset, mask, out, geometry):
    batch, channels, kernel, _ = weight.shape
    zero_dw, zero_dp, ones = reference.without_offsets(x, channels, kernel, out)
    return torch.cat(
        [
            reference.contextual_conv2d(
                x[b : b + 1],
                weight[b].unsqueeze(1),
                torch.zeros(channels, dtype=torch.float64),
                zero_dw[b : b + 1],
                (offset if offset is not None else zero_dp)[b : b + 1],
                (mask if mask is not None else ones)[b : b + 1],
                *geometry,
            )
            for b in range(batch)
        ]
    )


@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(case):
    tensors, upstream, geometry = inputs(*CASES[case])
    y, gradients = expected(tensors, upstream, geometry, large=case in LARGE)
    on_device = [t.to(DEVICE) if t is not None else None for t in tensors]
    assert relative_error(sampled_conv_triton.forward(*on_device, geometry), y) < 1e-6
    found = sampled_conv_triton.backward(upstream.to(DEVICE), *on_device, geometry)
    found = [g for g, t in zip(found, tensors, strict=True) if t is not None]
    for ours, theirs in zip(found, gradients, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-6


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    channels=st.sampled_from([1, 7, 64, 130]),
    height=st.integers(1, 6),
    width=st.integers(1, 9),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    spread=st.sampled_from([0.0, 0.3, 4.0]),
    with_mask=st.booleans(),
)
@pytest.mark.run
def test_drawn_shapes_through_the_public_op(batch, channels, height, width, kernel, stride, dilation, **drawn):
    padding = dilation * (kernel // 2)
    tensors, upstream, geometry = inputs(batch, channels, height, width, kernel, stride, padding, dilation, **drawn)
    geometry = dict(zip(("stride", "padding", "dilation"), geometry, strict=True))
    results = []
    for implementation, dtype, device in (("triton", torch.float32, DEVICE), ("torch", torch.float64, "cpu")):
        x, weight_offset, offset, mask = leaves = [
            t.to(device, dtype).requires_grad_() if t is not None else None for t in tensors
        ]
        y = contextual_conv2d(
            x,
            torch.ones(channels, 1, kernel, kernel, dtype=dtype, device=device),
            weight_offset=weight_offset,
            sampling_offset=offset,
            mask=mask,
            implementation=implementation,
            **geometry,
        )
        there = [leaf for leaf in leaves if leaf is not None]
        results.append([y.detach(), *torch.autograd.grad(y, there, upstream.to(device, dtype))])
    for ours, exact in zip(*results, strict=True):
        assert (ours.cpu() - exact).norm() <= 1e-6 * exact.norm() + 1e-9


def test_the_operator_keeps_torchs_rules():
    (x, weight, offset, mask), _, geometry = inputs(*CASES["far outside"])
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (x, weight, offset, mask)]
    torch.library.opcheck(sampled_conv.kernel, (*leaves, list(geometry), "triton"))


def test_a_position_that_is_nan_shows_in_the_gradient_of_the_map():
    """Its row in one image, its column in the other; two blocks of positions, so that there is one to leave out."""
    one_tap = dict(kernel=1, stride=1, padding=0, dilation=1)
    (x, weight, offset, _), upstream, geometry = inputs(2, 3, 8, 9, **one_tap, spread=2.0, with_mask=False)
    offset[0, 0, 2, 3] = offset[1, 1, 2, 3] = torch.nan
    leaf = x.clone().requires_grad_()
    (by_torch,) = torch.autograd.grad(sampled_conv_torch.forward(leaf, weight, offset, None, geometry), leaf, upstream)
    on_device = [tensor.to(DEVICE) for tensor in (upstream, x, weight, offset)]
    gradient = sampled_conv_triton.backward(*on_device, None, geometry)[0].cpu()
    assert by_torch.isnan().any(dim=(1, 2, 3)).all()
    assert gradient[by_torch.isnan()].isnan().all()


def test_kernels_are_launched_on_the_maps_device(monkeypatch):
    """Triton launches on the current device. That it is another one than the map's takes two GPUs: the next test."""
    device_of, current, launched = torch.cuda.device_of, [], {}

    @contextmanager
    def noted_device_of(tensor):
        with device_of(tensor):
            current.append(tensor)
            yield
            current.pop()

    class NotedKernel:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(sampled_conv_triton, name)

        def __getitem__(self, grid):
            launched[self.name] = [id(tensor) for tensor in current]
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", noted_device_of)
    names = ("_forward_kernel", "_weight_offset_kernel", "_input_kernel")
    for name in names:
        monkeypatch.setattr(sampled_conv_triton, name, NotedKernel(name))
    tensors, upstream, geometry = inputs(*CASES["far outside"])
    x, weight, offset, upstream = (tensor.to(DEVICE) for tensor in (*tensors[:3], upstream))
    sampled_conv_triton.forward(x, weight, offset, None, geometry)
    sampled_conv_triton.backward(upstream, x, weight, offset, None, geometry)
    assert launched == {name: [id(x)] for name in names}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_map_on_the_second_gpu_is_computed_there():
    tensors, upstream, geometry = inputs(*CASES["small"])
    results = []
    for device in ("cuda:0", "cuda:1"):
        on_device = [tensor.to(device) for tensor in tensors]
        gradients = sampled_conv_triton.backward(upstream.to(device), *on_device, geometry)
        results.append([sampled_conv_triton.forward(*on_device, geometry), *gradients])
    for first, second in zip(*results, strict=True):
        assert second.device.index == 1
        assert torch.equal(first.cpu(), second.cpu())


def relative_error(ours, theirs):
    return ((ours.cpu().double() - theirs).norm() / theirs.norm().clamp(min=1e-9)).item()


def test_the_same_bits_every_time():
    tensors, upstream, geometry = inputs(*CASES["far outside"])
    on_device = [t.to(DEVICE) for t in tensors]
    runs = [sampled_conv_triton.backward(upstream.to(DEVICE), *on_device, geometry) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_compiles_for_sm_90_without_spilling_registers():
    """The interpreter takes more than the compiler does: what passes above may still not compile."""
    done = run_python("scripts/dev/compile_kernels.py", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)["kernels"]
    launched = {
        (module.__name__.rpartition(".")[2], name.strip("_"))
        for module in (sampled_conv_triton, depthwise_conv_triton)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert len(launched) == 7
    assert {(kernel["module"], kernel["kernel"]) for kernel in kernels} == launched
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 100_000, kernel

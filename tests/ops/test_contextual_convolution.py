"""The identities of the op (docs of ops/contextual_convolution.py), in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import deform_conv2d

from contextual_cnn.errors import UserError
from contextual_cnn.ops import contextual_conv2d, sampled_conv, sampled_conv_cpp
from contextual_cnn.ops.contextual_convolution import output_size
from contextual_cnn.ops.implementation import choose, implementation_on
from tests.conftest import HAS_COMPILER
from tests.helpers import reference


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def implementation(request, monkeypatch):
    """Every identity holds for both implementations that a CPU has."""
    if request.param == "cpp" and not HAS_COMPILER:
        pytest.skip("no C++ compiler on this machine")
    monkeypatch.setenv("CONTEXTUAL_CNN_OPS", request.param)
    return request.param


CPP_ALONE = pytest.mark.parametrize("implementation", ["cpp"], indirect=True)  # plain torch is no operator of ours


def example(batch=2, channels=3, height=5, width=6, kernel=3, stride=1, padding=1, dilation=1, spread=1.5, seed=0):
    """Random inputs, and the arguments that go with them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    out = [output_size(size, kernel, stride, padding, dilation) for size in (height, width)]
    tensors = {
        "x": normal(batch, channels, height, width),
        "weight": normal(channels, 1, kernel, kernel),
        "bias": normal(channels),
        "weight_offset": normal(batch, channels, kernel, kernel),
        "sampling_offset": spread * normal(batch, 2 * kernel**2, *out),
        "mask": torch.rand(batch, kernel**2, *out, generator=g, dtype=torch.float64),
    }
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation}


def call(tensors, geometry):
    x, weight, bias, *_ = tensors.values()
    offsets = {name: tensors[name] for name in ("weight_offset", "sampling_offset", "mask")}
    return contextual_conv2d(x, weight, bias, **offsets, **geometry)


def torchvision_conv(x, weight, bias, weight_offset, sampling_offset, mask, stride, padding, dilation):
    """The released code's formulation: every (sample, channel) is a group with weights of its own."""
    batch, channels = x.shape[:2]
    kernels = (weight.squeeze(1) + weight_offset).flatten(0, 1).unsqueeze(1)
    y = deform_conv2d(
        x.reshape(1, batch * channels, *x.shape[2:]),
        sampling_offset.reshape(1, -1, *sampling_offset.shape[2:]),
        kernels,
        stride=stride,
        padding=padding,
        dilation=dilation,
        mask=mask.reshape(1, -1, *mask.shape[2:]),
    )
    return y.view(batch, channels, *y.shape[2:]) + bias.view(1, -1, 1, 1)


SHAPES = [
    dict(),
    dict(stride=2),
    dict(dilation=2, padding=2),
    dict(height=1, width=1),
    dict(height=2, width=1, kernel=7, padding=3),
    dict(batch=1, kernel=7, padding=3),
    dict(spread=30.0),
    dict(batch=1, channels=1),
    dict(stride=2, dilation=2, padding=1, height=7, width=4),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_loop_and_torchvision(shape):
    tensors, geometry = example(**shape)
    y = call(tensors, geometry)
    torch.testing.assert_close(y, reference.contextual_conv2d(*tensors.values(), *geometry.values()))
    torch.testing.assert_close(y, torchvision_conv(*tensors.values(), **geometry))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    spread=st.sampled_from([0.0, 0.3, 4.0]),
    seed=st.integers(0, 1000),
)
def test_equals_torchvision_on_any_shape(kernel, dilation, **shape):
    padding = dilation * (kernel // 2)
    tensors, geometry = example(kernel=kernel, dilation=dilation, padding=padding, **shape)
    torch.testing.assert_close(call(tensors, geometry), torchvision_conv(*tensors.values(), **geometry))


@pytest.mark.parametrize("geometry", [dict(padding=1), dict(stride=2), dict(padding=2, dilation=2)])
def test_zero_offsets_are_the_plain_convolution(geometry):
    tensors, _ = example()
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    plain = F.conv2d(x, weight, bias, **geometry, groups=3)
    dw, dp, _mask = reference.without_offsets(x, 3, 3, plain.shape[2:])
    torch.testing.assert_close(contextual_conv2d(x, weight, bias, **geometry), plain)
    torch.testing.assert_close(contextual_conv2d(x, weight, bias, sampling_offset=dp, **geometry), plain)
    torch.testing.assert_close(
        contextual_conv2d(x, weight, bias, weight_offset=dw, sampling_offset=dp, **geometry), plain
    )


def test_weight_offsets_alone_are_a_kernel_per_sample():
    tensors, _ = example(batch=3)
    x, weight, dw = tensors["x"], tensors["weight"], tensors["weight_offset"]
    each = [F.conv2d(x[i : i + 1], weight + dw[i].unsqueeze(1), padding=1, groups=3) for i in range(3)]
    torch.testing.assert_close(contextual_conv2d(x, weight, weight_offset=dw, padding=1), torch.cat(each))


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (-1, 3)])
def test_whole_pixel_offset_is_a_shifted_convolution(shift):
    tensors, _ = example(height=6, width=7)
    x, weight = tensors["x"], tensors["weight"]
    offset = torch.tensor(shift, dtype=torch.float64).repeat(9).view(1, 18, 1, 1).expand(2, 18, 6, 7)
    wide = F.conv2d(F.pad(x, [5] * 4), weight, groups=3)  # 4 positions more on every side than padding 1
    expected = wide[:, :, 4 + shift[0] : 10 + shift[0], 4 + shift[1] : 11 + shift[1]]
    torch.testing.assert_close(contextual_conv2d(x, weight, sampling_offset=offset, padding=1), expected)


@pytest.mark.parametrize("geometry", [dict(), dict(stride=2), dict(dilation=2, padding=2)])
@pytest.mark.parametrize(
    "absent", [(), ("mask",), ("sampling_offset",), ("mask", "sampling_offset"), ("weight_offset",)]
)
def test_dense_equals_a_depthwise_convolution_per_output_channel(geometry, absent):
    """sum over c of depthwise convolutions with the weights of one output channel at a time."""
    tensors, geometry = example(**geometry)
    offsets = {name: tensors[name] for name in ("weight_offset", "sampling_offset", "mask") if name not in absent}
    dense = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    y = contextual_conv2d(tensors["x"], dense, bias, **offsets, **geometry)
    each = [contextual_conv2d(tensors["x"], w.unsqueeze(1), **offsets, **geometry).sum(dim=1) for w in dense]
    torch.testing.assert_close(y, torch.stack(each, dim=1) + bias.view(1, -1, 1, 1))


def test_gradients_of_the_dense_form_by_finite_differences():
    tensors, geometry = example(batch=1, channels=2, height=3, width=3)
    inputs = [tensors[name] for name in ("x", "weight_offset", "sampling_offset", "mask")]
    inputs.append(torch.randn(2, 2, 3, 3, dtype=torch.float64))

    def dense(x, weight_offset, sampling_offset, mask, weight):
        offsets = dict(weight_offset=weight_offset, sampling_offset=sampling_offset, mask=mask)
        return contextual_conv2d(x, weight, **offsets, **geometry)

    assert torch.autograd.gradcheck(dense, [tensor.requires_grad_() for tensor in inputs])


def test_gradients_by_finite_differences():
    tensors, geometry = example(batch=2, channels=2, height=3, width=4)
    for tensor in tensors.values():
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *values: call(dict(zip(tensors, values, strict=True)), geometry), (*tensors.values(),)
    )


def test_gradients_at_whole_pixels_are_torchvisions():
    """Finite differences fail at the kink, where every sample of a fresh layer lies."""
    tensors, geometry = example(spread=0.0)
    gradients = []
    for convolution in (call, lambda t, g: torchvision_conv(*t.values(), **g)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        convolution(leaves, geometry).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_empty_batch_and_channels_last():
    tensors, geometry = example()
    empty = {name: t[:0] if len(t) == 2 and name not in ("weight", "bias") else t for name, t in tensors.items()}
    assert call(empty, geometry).shape == (0, 3, 5, 6)
    last = {name: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for name, t in tensors.items()}
    torch.testing.assert_close(call(last, geometry), call(tensors, geometry))


def test_large_batches_are_computed_in_chunks(monkeypatch):
    tensors, geometry = example(batch=5)
    whole = call(tensors, geometry)
    monkeypatch.setattr("contextual_cnn.ops.sampled_conv_torch._CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(call(tensors, geometry), whole)


def test_threads_change_nothing():
    """With fewer samples than threads the C++ kernel cuts the channels into ranges."""
    tensors, geometry = example(batch=1, channels=100)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        call(leaves, geometry).square().sum().backward()
        results.append([leaf.grad for leaf in leaves.values()])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, another)


@CPP_ALONE
@pytest.mark.parametrize("absent", [(), ("mask",), ("sampling_offset",)])
def test_the_operator_keeps_torchs_rules(absent):
    """Schema, fake tensors, autograd and compilation agree with what the operator does."""
    tensors, geometry = example()
    offset, mask = (None if name in absent else tensors[name].requires_grad_() for name in ("sampling_offset", "mask"))
    weight = (tensors["weight"].squeeze(1) + tensors["weight_offset"]).requires_grad_()
    torch.library.opcheck(
        sampled_conv.kernel, (tensors["x"].requires_grad_(), weight, offset, mask, list(geometry.values()), "cpp")
    )


@CPP_ALONE
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("absent", [(), ("mask",), ("sampling_offset",)])
def test_the_operators_gradient_keeps_torchs_rules(absent, layout):
    tensors, geometry = example()
    offset, mask = (None if name in absent else tensors[name] for name in ("sampling_offset", "mask"))
    weight = tensors["weight"].squeeze(1) + tensors["weight_offset"]
    x = tensors["x"].contiguous(memory_format=layout)
    upstream = torch.randn_like(call(tensors, geometry))
    arguments = (upstream, x, weight, offset, mask, list(geometry.values()), "cpp")
    torch.library.opcheck(sampled_conv.kernel_backward, arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        promised = sampled_conv.kernel_backward(*fakes)
    for real, fake in zip(sampled_conv.kernel_backward(*arguments), promised, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_compiles_and_exports_whole():
    class Layer(torch.nn.Module):
        def forward(self, *values):
            return call(dict(zip(tensors, values, strict=True)), geometry)

    tensors, geometry = example()
    expected = call(tensors, geometry)
    inputs = tuple(tensors.values())
    torch.testing.assert_close(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*inputs), expected)
    torch.testing.assert_close(torch.export.export(Layer(), inputs).module()(*inputs), expected)


def test_one_call_tells_who_computes(implementation, monkeypatch):
    cpu = torch.device("cpu")
    assert implementation_on(cpu) == implementation
    monkeypatch.delenv("CONTEXTUAL_CNN_OPS")
    assert implementation_on(cpu) == ("cpp" if HAS_COMPILER else "torch")
    monkeypatch.setenv("CONTEXTUAL_CNN_OPS", "fast")
    with pytest.raises(UserError, match="CONTEXTUAL_CNN_OPS=fast"):
        implementation_on(cpu)


def test_an_unknown_implementation_is_refused(monkeypatch):
    monkeypatch.setenv("CONTEXTUAL_CNN_OPS", "fast")
    with pytest.raises(UserError, match="CONTEXTUAL_CNN_OPS=fast"):
        call(*example())
    tensors, geometry = example()
    with pytest.raises(UserError, match="implementation=quick"):
        call(tensors, geometry | {"implementation": "quick"})


def test_the_argument_outranks_the_environment(monkeypatch):
    tensors, geometry = example()
    expected = call(tensors, geometry)
    monkeypatch.setenv("CONTEXTUAL_CNN_OPS", "triton")
    with pytest.raises(UserError, match=r"triton.*torch\.float64"):
        call(tensors, geometry)
    torch.testing.assert_close(call(tensors, geometry | {"implementation": "torch"}), expected)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    torch.testing.assert_close(call(single, geometry | {"implementation": "triton"}), expected.float())


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_plain_torch_takes_over_with_one_line(monkeypatch, tmp_path, caplog, compiler):
    monkeypatch.delenv("CONTEXTUAL_CNN_OPS")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sampled_conv_cpp.is_available.cache_clear()
    try:
        assert [choose("auto", "cpu", torch.float32) for _ in range(2)] == ["torch", "torch"]
        with pytest.raises(UserError, match=r"\bcpp\b"):
            choose("cpp", "cpu", torch.float32)
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert [compiler in warning for warning in warnings] == [True]
        assert not list(tmp_path.rglob("*.so"))
    finally:
        sampled_conv_cpp.is_available.cache_clear()


def test_bfloat16_in_and_out_with_float32_sums():
    tensors, geometry = example(channels=8)
    low = {
        name: t.bfloat16() if name in ("x", "weight", "weight_offset", "bias") else t.float()
        for name, t in tensors.items()
    }
    y = call(low, geometry)
    exact = call({name: t.double() for name, t in low.items()}, geometry)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() / exact.norm() < 6e-3  # one rounding of the weights' sum, two of the output


def test_non_finite_offsets_show_in_the_output_and_crash_nothing():
    tensors, geometry = example()
    for value in (float("nan"), float("inf")):
        tensors["sampling_offset"][0, 0, 0, 0] = value
        y = call(tensors, geometry)
        assert y[0, :, 0, 0].isnan().all()
        assert y[1].isfinite().all()


@pytest.mark.parametrize("name", ["weight", "weight_offset", "sampling_offset", "mask"])
def test_shapes_that_do_not_belong_together_are_refused(name):
    tensors, geometry = example()
    tensors[name] = tensors[name][..., :-1] if name != "weight" else tensors[name][:-1]
    with pytest.raises(ValueError, match=name):
        call(tensors, geometry)

"""A snapshot is the state of its moment, in few storages."""

import torch

from contextual_cnn.engine.snapshot import take_snapshot
from contextual_cnn.models import build_model
from contextual_cnn.optim import build_optimizer


def test_equal_then_independent_and_in_few_storages():
    model = build_model(name="contextual_convnext_atto", num_classes=10).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model)
    model(torch.zeros(2, 3, 32, 32)).logits[-1].sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "list": [1, (2.0, "x")]}
    state["mixed"] = [torch.arange(5), torch.tensor(1.5), torch.zeros(0), torch.eye(3)[:, 1]]
    snapshot, copied = take_snapshot(state)
    copied()
    assert snapshot["list"] == [1, (2.0, "x")]
    assert snapshot["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for one, other in zip(state["mixed"], snapshot["mixed"], strict=True):
        assert torch.equal(one, other)
    for name, tensor in state["model"].items():
        copy = snapshot["model"][name]
        assert torch.equal(copy, tensor)
        assert copy.dtype == tensor.dtype
        assert copy.data_ptr() != tensor.data_ptr()
        if tensor.ndim == 4:
            assert copy.is_contiguous(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in snapshot["model"].items()}
    for tensor in state["model"].values():
        tensor.add_(1)
    assert all(torch.equal(snapshot["model"][name], tensor) for name, tensor in before.items())
    tensors = [*snapshot["model"].values(), *(t for s in snapshot["optimizer"]["state"].values() for t in s.values())]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) < 10 < 100 < len(tensors)

"""A model on a GPU that need not be there: fake tensors have types, shapes and a device, and no numbers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.functional import layer_norm, linear


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """bfloat16, and what torch.autocast("cuda") switches on; it switches itself off where there is no CUDA."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def run_under_autocast(model: nn.Module, watch: AbstractContextManager = nullcontext()) -> None:  # noqa: B008
    """Two images of 64 x 64 through a model that was made on the meta device. watch: a dispatch mode."""
    with FakeTensorMode():
        state = {
            key: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda", requires_grad=tensor.requires_grad)
            for key, tensor in model.state_dict(keep_vars=True).items()
        }
        images, weight = torch.empty(2, 3, 64, 64, device="cuda"), torch.empty(4, 64, device="cuda")
        with cuda_autocast(), watch:
            assert linear(images, weight).dtype == torch.bfloat16  # it is on, and does what it does on a GPU
            assert layer_norm(images.bfloat16(), (64,)).dtype == torch.float32
            functional_call(model, state, (images,))

"""Copies to a GPU that nobody waits for: on fake tensors of a GPU, which show every copy, and refuse every question."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data import random_erasing, synthetic_loader, worker_batches
from contextual_cnn.data.augmentation import Augmentation
from contextual_cnn.data.on_device import augment, normalise
from contextual_cnn.data.randaugment.policy import ImageOps, Op
from contextual_cnn.data.sampler import MicroBatch, TrainSampler
from contextual_cnn.data.transfer import to_device
from contextual_cnn.distributed import World
from contextual_cnn.randomness import Places
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings

GPU = torch.device("cuda", 0)


class Copies(TorchDispatchMode):
    """Every copy from the host to the GPU, as (from pinned memory, without waiting)."""

    def __init__(self, pinned):
        super().__init__()
        self.pinned, self.copies = pinned, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.device.type == "cuda":
            for tensor in tensors:
                if tensor.device.type == "cpu" and tensor.dim():
                    without_waiting = (kwargs or {}).get("non_blocking", False)
                    self.copies.append((id(tensor) in self.pinned, without_waiting))
        return result


@pytest.fixture
def copies(monkeypatch):
    """Fake tensors of a GPU. Memory cannot be pinned without one, so it is only noted what would be."""
    pinned = {}

    def pin_memory(tensor):
        pinned[id(tensor)] = tensor  # held, or another tensor may get its number
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies(pinned) as copies:
        yield copies


def images():
    return torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=GPU)


def draws_of_every_operation():
    """Each of the fifteen for an image; the flips of a seed."""
    draws = Augmentation(AugmentSettings(), 0).draw(MicroBatch(0, 0, np.arange(8)))
    ops = np.array([op for op in Op if op != Op.NONE] + [Op.NONE]).reshape(8, 2)
    return type(draws)(draws.height, draws.width, draws.place, draws.flip, ImageOps(ops, np.full((8, 2), 3.0)))


def erase():
    with mock.patch.object(torch, "Generator"), mock.patch.object(torch.Tensor, "normal_"):  # they need a real GPU
        random_erasing.erase_randomly(torch.zeros(8, 3, 32, 32, device=GPU), 1.0, Places(0, 0, 0, 8))


def augment_on_device(interpolation):
    augment(images(), draws_of_every_operation(), fill=(1, 2, 3), interpolation=interpolation)


class Source:
    targets = np.arange(16)
    classes = tuple("abcd")

    def __len__(self):
        return 16


def synthetic_batches():
    sampler = TrainSampler(BatchPlan.make(images=16, global_batch=8, micro_batch=8, world_size=1), 0, 0)
    settings = DataSettings(root="", image_size=32, eval_batch_size=8)
    next(synthetic_loader.train_batches(Source(), sampler, None, None, settings, GPU))
    passes = synthetic_loader.EvaluationBatches(Source(), None, settings, World(0, 1, 0, GPU))
    next(iter(passes))


def torch_loaders_batches():
    made = worker_batches.Made(torch.zeros(8, 32, 32, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), [])
    ((pixels, targets, _),) = worker_batches.on_device([made], None, GPU)
    assert (pixels.device, targets.device) == (GPU, GPU)


PATHS = {
    "helper": lambda: to_device(np.arange(3), GPU),
    "erasing": erase,
    "augmentation, bilinear": lambda: augment_on_device("bilinear"),
    "augmentation, bicubic": lambda: augment_on_device("bicubic"),
    "normalisation": lambda: normalise(images(), (0.4, 0.5, 0.6), [0.1, 0.2, 0.3]),
    "synthetic loader": synthetic_batches,
    "torch loader": torch_loaders_batches,
}


@pytest.mark.parametrize("path", PATHS)
def test_every_copy_to_a_gpu_is_from_pinned_memory_and_not_waited_for(copies, path):
    PATHS[path]()
    assert copies.copies
    assert set(copies.copies) == {(True, True)}


def test_an_ordinary_copy_and_a_question_are_seen(copies):
    """That the test above can fail."""
    torch.from_numpy(np.arange(3)).to(GPU)
    torch.tensor([1.0, 2.0], device=GPU)
    torch.from_numpy(np.arange(3)).to(GPU, non_blocking=True)
    assert copies.copies == [(False, False), (False, False), (False, True)]
    mask = torch.zeros(3, dtype=torch.bool, device=GPU)
    with pytest.raises(DynamicOutputShapeException):
        mask.nonzero()
    with pytest.raises(DataDependentOutputException):
        mask.any().item()


def test_on_a_cpu_nothing_is_copied():
    array = np.arange(3.0)
    assert to_device(array, torch.device("cpu")).data_ptr() == array.ctypes.data
    tensor = torch.ones(2)
    assert to_device(tensor, torch.device("cpu")) is tensor

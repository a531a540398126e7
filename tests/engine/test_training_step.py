"""What a step refuses to go on with, and says when it cannot be made."""

import copy
from types import SimpleNamespace

import pytest
import torch
from timm.layers import DropPath
from timm.utils import ModelEmaV3
from torch import nn

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.contracts import Batch
from contextual_cnn.distributed import World
from contextual_cnn.engine import training_step as training_step_module
from contextual_cnn.engine.training_step import TrainingStep
from contextual_cnn.errors import UserError
from contextual_cnn.optim import build_optimizer, build_schedule
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.loss import LossSettings
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings
from contextual_cnn.settings.schedule import ScheduleSettings
from contextual_cnn.settings.trainer import TrainerSettings
from contextual_cnn.task import Position
from contextual_cnn.tasks.image_classification.settings import ImageClassificationSettings
from contextual_cnn.tasks.image_classification.task import ImageClassification

NOTHING_DRAWN = AugmentSettings(erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)


class WithStatistics(nn.Sequential):
    """(B, 3, 4, 4) -> (B, 2) logits, with a batch norm on the way."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))


class Small(nn.Module):
    """Two layers of the same shape, so that their moments could be mistaken for each other's."""

    def __init__(self, *order: str, size: int = 4) -> None:
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(size, size))


def training_step(model, state=None, micro_batch=8, optimizer=None, augment=NOTHING_DRAWN, **settings):
    optimizer = optimizer or build_optimizer(model, OptimizerSettings(), 4096)
    plan = BatchPlan.make(images=16, global_batch=8, micro_batch=micro_batch, world_size=1)
    return TrainingStep(
        TrainerSettings(**dict(ema_decay=None) | settings),
        task(augment),
        model,
        optimizer,
        build_schedule(optimizer, ScheduleSettings(), 10),
        Position(plan, 0, World(0, 1, 0, torch.device("cpu"))),
        state,
    )


def task(augment):
    """Image classification without its data."""
    settings = ImageClassificationSettings(
        model=ModelSettings(name="resnet18"),
        data=DataSettings(root=""),
        augment=augment,
        loss=LossSettings(),
    )
    return ImageClassification(settings, SimpleNamespace(num_classes=2, sources={}))


@pytest.mark.parametrize(("compile", "on"), [("auto", ["cuda"]), (True, ["cuda", "cpu"]), (False, [])])
def test_auto_compiles_on_a_gpu_alone(compile, on):
    assert [device for device in ("cuda", "cpu") if TrainerSettings(compile=compile).compiles_on(device)] == on


def test_training_and_evaluations_are_compiled_in_the_mode_that_is_asked_for(monkeypatch):
    modes = []

    def compiled(model, mode):
        modes.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    mode = "max-autotune-no-cudagraphs"
    step = training_step(WithStatistics(), compile=True, compile_mode=mode, ema_decay=0.9)
    assert modes == [mode]
    assert list(step.evaluated_calls()) == ["raw", "ema"]
    assert modes == [mode] * 3
    training_step(WithStatistics()).evaluated_calls()  # on a CPU
    assert len(modes) == 3


def test_moments_of_other_parameters_are_refused():
    state = training_step(Small("first", "second")).state()
    assert state["optimized"] == [["first.bias", "second.bias"], ["first.weight", "second.weight"]]
    training_step(Small("first", "second"), state)
    with pytest.raises(UserError, match=r"optimizer.*parameters"):
        training_step(Small("second", "first"), state)
    del state["optimized"]  # a checkpoint of before they were named
    training_step(Small("first", "second"), state)


def test_the_state_of_another_model_is_refused_with_what_differs():
    state = training_step(Small("first", "second")).state()
    with pytest.raises(UserError, match=r"first\.weight.*\[4, 4\].*\[5, 5\]"):
        training_step(Small("first", "second", size=5), state)


def test_a_step_that_is_skipped_leaves_the_statistics_of_batch_norms_too():
    model = WithStatistics()
    step = training_step(model)
    targets = torch.zeros(8, dtype=torch.int64)
    step(0, iter([Batch(torch.randn(8, 3, 4, 4), targets)]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert before["0.num_batches_tracked"] == 1
    step(1, iter([Batch(torch.full((8, 3, 4, 4), torch.nan), targets)]))
    assert step.meter.skipped_in_a_row == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def losses_of(step, first, end):
    images = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for number in range(first, end):
        step(number, iter(Batch(part.clone(), torch.arange(4) % 2) for part in images[:8].split(4)))
        found.append(step.meter.read()[0]["loss"])
    return found


class WithDroppedPath(WithStatistics):
    def __init__(self) -> None:
        super().__init__()
        self.insert(1, DropPath(0.5))


def test_a_run_of_before_places_were_drawn_by_goes_on_as_it_began(monkeypatch):
    """Such a checkpoint does not say how it draws; each of its micro-batches was normalised by itself."""
    mixed = dict(augment=AugmentSettings(erasing=0.5), micro_batch=4)
    torch.manual_seed(0)
    model = WithDroppedPath()
    monkeypatch.setattr(training_step_module, "DRAWS", 1)
    old = training_step(model, **mixed)
    assert old.norms.images == 4
    losses_of(old, 0, 2)
    state = copy.deepcopy(old.state())
    assert state.pop("draws") == 1
    expected = losses_of(old, 2, 4)
    monkeypatch.undo()
    resumed = training_step(WithDroppedPath(), state, **mixed)
    assert losses_of(resumed, 2, 4) == expected
    assert resumed.state()["draws"] == 1
    new = training_step(WithDroppedPath(), state | {"draws": 2}, **mixed)
    assert losses_of(new, 2, 4) != expected


def test_draws_of_a_later_version_are_refused():
    state = training_step(Small("first")).state()
    with pytest.raises(UserError, match="later version"):
        training_step(Small("first"), state | {"draws": 99})


@pytest.mark.parametrize("warmup", [False, True], ids=["", "warm-up of the average"])
def test_a_step_that_is_skipped_leaves_the_average_too(warmup):
    model = WithStatistics()
    step = training_step(model, ema_decay=0.9, ema_warmup=warmup)
    expected = ModelEmaV3(model, decay=0.9, use_warmup=warmup)
    good = [Batch(torch.randn(8, 3, 4, 4), torch.arange(8) % 2) for _ in range(3)]
    for number in range(3):
        step(number, iter([good[number]]))
        expected.update(model, step=number + 1 if warmup else None)
        assert_equal_states(step.ema.module, expected.module)  # what is not skipped is timm's own update
    before = copy.deepcopy(step.ema.module)
    step(3, iter([Batch(torch.full((8, 3, 4, 4), torch.nan), torch.arange(8) % 2)]))
    assert step.meter.skipped_in_a_row == 1
    assert_equal_states(step.ema.module, before)


def assert_equal_states(one, other):
    for (name, tensor), (_, expected) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(tensor, expected), name


OPTIMIZERS = {
    "timm's adamw": lambda model: build_optimizer(model, OptimizerSettings(lr=0.1), 4096),
    "timm's lamb": lambda model: build_optimizer(model, OptimizerSettings(name="lamb", lr=0.1, eps=1e-6), 4096),
    "torch's plain adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("saved_as", [True, False], ids=["channels_last", "contiguous"])
def test_a_resume_with_another_memory_format_takes_the_same_step(saved_as, optimizer):
    """The moments follow their parameters; torch's fused kernels walk through both side by side in memory."""
    batches = [Batch(torch.randn(8, 3, 4, 4), torch.arange(8) % 2) for _ in range(4)]

    def start(channels_last, state=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 2))
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        made = OPTIMIZERS[optimizer](model)
        return training_step(model, state, optimizer=made, channels_last=channels_last)

    first = start(saved_as)
    for number in range(3):
        first(number, iter([batches[number]]))
    state = copy.deepcopy(first.state())
    same, flipped = start(saved_as, copy.deepcopy(state)), start(not saved_as, copy.deepcopy(state))
    for parameter, moments in flipped.optimizer.state.items():
        for name, moment in moments.items():
            if moment.ndim:
                assert moment.stride() == parameter.stride(), name
    for resumed in (same, flipped):
        resumed(3, iter([batches[3]]))
    for name, tensor in same.module.state_dict().items():
        assert torch.allclose(tensor, flipped.module.state_dict()[name], atol=1e-5), name


def test_micro_batches_of_one_image_are_refused_where_a_batch_norm_sees_one_vector_each():
    with pytest.raises(UserError, match="projection_norm=layer"):
        training_step(nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4)), micro_batch=1)
    training_step(WithStatistics(), micro_batch=1)  # maps have positions to count

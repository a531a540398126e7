"""What a step refuses to go on with, and says when it cannot be made."""

import pytest
import torch
from torch import nn

from contextual_cnn.contracts import Batch
from contextual_cnn.data.bad_images import BadImages
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.distributed import World
from contextual_cnn.engine.trainer_settings import TrainerSettings
from contextual_cnn.engine.training_step import TrainingStep
from contextual_cnn.errors import UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.optim import build_optimizer, build_schedule


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


def training_step(model, state=None, micro_batch=8):
    optimizer = build_optimizer(model)
    return TrainingStep(
        TrainerSettings(ema_decay=None),
        model=model,
        loss=StagedCrossEntropy(),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, 10),
        augment=lambda batch: batch,
        bad_images=BadImages("skip", 1),
        plan=BatchPlan.make(images=16, global_batch=8, micro_batch=micro_batch, world_size=1),
        seed=0,
        world=World(0, 1, 0, torch.device("cpu")),
        state=state,
    )


def test_moments_of_other_parameters_are_refused():
    state = training_step(Small("first", "second")).state()
    assert state["optimized"] == [["first.bias", "second.bias"], ["first.weight", "second.weight"]]
    training_step(Small("first", "second"), state)
    with pytest.raises(UserError, match="optimizer has other parameters, or in another order"):
        training_step(Small("second", "first"), state)
    del state["optimized"]  # a checkpoint of before they were named
    training_step(Small("first", "second"), state)


def test_the_state_of_another_model_is_refused_with_what_differs():
    state = training_step(Small("first", "second")).state()
    with pytest.raises(UserError, match=r"of another model: size mismatch for first\.weight.*\[4, 4\].*\[5, 5\]"):
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


def test_micro_batches_of_one_image_are_refused_where_a_batch_norm_sees_one_vector_each():
    with pytest.raises(UserError, match=r"micro-batches of one image\n.*projection_norm=layer"):
        training_step(nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4)), micro_batch=1)
    training_step(WithStatistics(), micro_batch=1)  # maps have positions to count

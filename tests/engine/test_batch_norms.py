"""Statistics of as many images as the recipe wants, and running statistics that all processes share."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from contextual_cnn.batch_plan import BatchPlan, NormPlan
from contextual_cnn.engine.batch_norms import BatchNorms

YES = torch.tensor(True)
NORMS = {
    "1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "2d": (lambda: nn.BatchNorm2d(3), (3, 4, 5)),
    "timm": (lambda: BatchNormAct2d(3), (3, 4, 5)),
    "without weights": (lambda: nn.BatchNorm2d(3, affine=False), (3, 4, 5)),
}


def plan_of(micro_batch, global_batch=16):
    return BatchPlan.make(images=1000, global_batch=global_batch, micro_batch=micro_batch, world_size=1)


@pytest.fixture(params=NORMS)
def norm_and_images(request):
    make, shape = NORMS[request.param]
    torch.manual_seed(0)
    norm, images = make(), 3 * torch.randn(16, *shape) + 1
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm, images


def test_one_statistic_a_step_is_torchs_own_norm(norm_and_images):
    norm, images = norm_and_images
    ours = copy.deepcopy(norm)
    norms = BatchNorms(ours, plan_of(16), NormPlan(16))
    expected, found = norm(images), ours(images)
    assert torch.equal(found, expected)
    norms.settle(YES)
    torch.testing.assert_close(ours.state_dict(), norm.state_dict())
    assert torch.equal(ours.eval()(images), ours(images))
    torch.testing.assert_close(ours(images), norm.eval()(images))


def test_parts_of_a_micro_batch_are_normalised_as_micro_batches_of_their_size(norm_and_images):
    norm, images = norm_and_images
    ours = copy.deepcopy(norm)
    norms = BatchNorms(ours, plan_of(16), NormPlan(4, parts=4))
    expected = torch.cat([norm(part) for part in images.chunk(4)])
    assert torch.equal(ours(images), expected)
    norms.settle(YES)
    assert ours.num_batches_tracked == 4


@pytest.mark.parametrize("micro_batch", [4, 8, 16])
def test_running_statistics_do_not_depend_on_the_accumulation(micro_batch):
    torch.manual_seed(0)
    images = torch.randn(16, 3, 4, 4, dtype=torch.float64)
    norm = nn.BatchNorm2d(3).double()
    norms = BatchNorms(norm, plan_of(micro_batch), NormPlan(4, parts=micro_batch // 4))
    for step in range(3):
        for part in (images + step).split(micro_batch):
            norm(part)
        norms.settle(YES)
    mean = torch.zeros(3, dtype=torch.float64)
    for step in range(3):
        mean += (1 - 0.9**4) * ((images + step).mean((0, 2, 3)) - mean)
    torch.testing.assert_close(norm.running_mean, mean)


def test_a_step_that_is_not_taken_leaves_no_trace():
    norm = nn.BatchNorm2d(3)
    norms = BatchNorms(norm, plan_of(16), NormPlan(16))
    before = copy.deepcopy(norm.state_dict())
    norm(torch.full((16, 3, 4, 4), torch.nan))
    norms.settle(~YES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    norm(torch.ones(16, 3, 4, 4))
    norms.settle(YES)
    torch.testing.assert_close(norm.running_mean, torch.full((3,), 0.1))


def test_a_frozen_norm_stays_as_it_is():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    norms = BatchNorms(model, plan_of(16), NormPlan(16))
    model[0].eval()
    model(torch.randn(16, 3, 4, 4))
    norms.settle(YES)
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert not torch.equal(model[1].running_mean, torch.zeros(3))


def test_a_compiled_model_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), BatchNormAct2d(3))
    twin = copy.deepcopy(model)
    norms, twins = (BatchNorms(m, plan_of(16), NormPlan(4, parts=2)) for m in (model, twin))
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for step in range(2):
        for part in torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(step)):
            torch.testing.assert_close(compiled(part), model(part))
        norms.settle(YES)
        twins.settle(YES)
    torch.testing.assert_close(twin.state_dict(), model.state_dict())

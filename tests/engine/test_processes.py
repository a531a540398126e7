"""The same run on 1, 2 and 4 processes: in float64, with batch norms, mixing, erasing and dropped paths."""

import numpy as np
import pytest

from contextual_cnn.settings.model import ModelSettings
from tests.helpers.small_models import small
from tests.helpers.steps_in_processes import CLASSES, train, wait_in_the_first_step

pytestmark = pytest.mark.run

MODELS = {
    "contextual": dict(name="contextual_convnext_atto", timm_options=small("convnext_atto"), drop_path_rate=0.2),
    "contextual resnet": dict(name="contextual_resnet50", timm_options=small("resnet50"), drop_path_rate=0.2),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return ModelSettings(num_classes=CLASSES, **MODELS[request.param])


@pytest.fixture(scope="module")
def alone(model):
    return train(model, world_size=1, micro_batch=16)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 8), (4, 4), (2, 4)])
def test_processes_with_smaller_micro_batches_train_the_same_model(model, alone, world_size, micro_batch):
    """The last one accumulates: its statistics are of 8 images, so it is compared with one process of that norm."""
    expected = alone if world_size * micro_batch == 16 else train(model, 1, 16, norm_batch=8)
    found = train(model, world_size, micro_batch)
    for rank in found:
        np.testing.assert_allclose(rank["losses"], expected[0]["losses"], rtol=1e-9)
        for name, value in expected[0]["state"].items():
            np.testing.assert_allclose(rank["state"][name], value, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("model", ["contextual"], indirect=True)
def test_a_norm_over_ranks_waits_no_longer_than_the_run(model, tmp_path):
    """The group of ranks that share a statistic has torch's own patience, half an hour, unless it is told ours."""
    assert "did not answer within 0.05 min" in wait_in_the_first_step(model, tmp_path / "told")


def test_without_joining_another_model_is_trained(model, alone):
    found = train(model, 2, 8, sync_bn=False)
    assert not np.allclose(found[0]["losses"], alone[0]["losses"], rtol=1e-4)
    for name in found[0]["state"]:  # the running statistics too, which DDP would take from rank 0
        np.testing.assert_array_equal(found[0]["state"][name], found[1]["state"][name], err_msg=name)


def test_gradients_may_cross_the_ranks_in_half_the_bytes(model, alone):
    """The first loss is of the same weights; what follows differs by a rounding, alike on both ranks."""
    first, second = train(model, 2, 8, compress_gradients=True)
    assert first["losses"][0] == pytest.approx(alone[0]["losses"][0], rel=1e-9)
    assert first["losses"] == pytest.approx(alone[0]["losses"], rel=0.02)
    assert first["losses"] != pytest.approx(alone[0]["losses"], rel=1e-9)
    for name in first["state"]:
        np.testing.assert_array_equal(first["state"][name], second["state"][name], err_msg=name)

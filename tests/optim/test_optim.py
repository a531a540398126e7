"""Decay groups, the schedule's values, and the guard."""

import numpy as np
import pytest
import torch

from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.optim import build_optimizer, build_schedule, step_if_finite
from tests import reference


def test_biases_norms_embeddings_and_temperature_do_not_decay():
    model = build_model(name="contextual_convnext_atto", num_classes=10)
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.05)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    spared = {name for name, p in model.named_parameters() if decays[id(p)] == 0}
    for name, parameter in model.named_parameters():
        named = name in ("class_embeddings.weight", "class_embeddings.log_inverse_temperature")
        assert (name in spared) == (named or parameter.ndim <= 1), name
    assert any(name.endswith("sampling_offset.out.bias") for name in spared)
    assert any(name.endswith("weight_offset.out.bias") for name in spared)


@pytest.mark.parametrize(("epochs", "warmup"), [(300, 20), (10, 3), (5, 0)])
def test_schedule_is_convnexts(epochs, warmup):
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    schedule = build_schedule(optimizer, 7, epochs=epochs, warmup_epochs=warmup)
    rates = []
    for step in range(epochs * 7):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, reference.convnext_schedule(1e-3, 1e-6, epochs, 7, warmup), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_non_finite_step_changes_nothing_at_all(name):
    def trained(gradients):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        options = dict(betas=None, eps=None, momentum=0.9) if name == "sgd" else {}
        optimizer = build_optimizer(model, name=name, lr=0.1, **options)
        for gradient in gradients:
            for p in model.parameters():
                p.grad = torch.full_like(p, gradient)
            finite = torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
            step_if_finite(optimizer, finite)
        return model.weight.detach()

    nan, inf = float("nan"), float("inf")
    assert torch.equal(trained([0.5, nan, -0.25, inf, 1.0]), trained([0.5, -0.25, 1.0]))
    assert not torch.equal(trained([0.5]), trained([0.5, 0.25]))


@pytest.mark.parametrize(
    "options", [dict(name="admw"), dict(name="sgd", betas=[0.9, 0.99]), dict(name="adamw", momentum=0.9)]
)
def test_unknown_optimizers_and_options_are_refused(options):
    with pytest.raises(UserError):
        build_optimizer(torch.nn.Linear(2, 2), **options)


def test_a_warm_up_as_long_as_the_run_is_refused():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(UserError, match="warmup"):
        build_schedule(optimizer, 10, epochs=20, warmup_epochs=20)

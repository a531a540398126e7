"""Decay groups, the schedule's values, and the guard."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from timm.utils import adaptive_clip_grad

from contextual_cnn.errors import UserError
from contextual_cnn.models import build_model
from contextual_cnn.optim import build_optimizer, build_schedule, clip_gradients, may_step
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings
from contextual_cnn.settings.schedule import ScheduleSettings
from tests.helpers import reference
from tests.helpers.small_models import small


def test_biases_norms_embeddings_and_temperature_do_not_decay():
    model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=10))
    optimizer = build_optimizer(model, OptimizerSettings(lr=1e-3, weight_decay=0.05), 4096)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    spared = {name for name, p in model.named_parameters() if decays[id(p)] == 0}
    for name, parameter in model.named_parameters():
        named = name in ("class_embeddings.weight", "class_embeddings.log_inverse_temperature")
        assert (name in spared) == (named or parameter.ndim <= 1), name
    assert any(name.endswith("sampling_offset.out.bias") for name in spared)
    assert any(name.endswith("weight_offset.out.bias") for name in spared)


@pytest.mark.parametrize("name", ["resnet50", "contextual_resnet50"])
def test_biases_and_the_classifier_may_learn_faster(name):
    """TSM: biases twice, the classifier five times, its bias ten times; norms as ever, and nothing decays otherwise."""
    model = build_model(ModelSettings(name=name, num_classes=10, timm_options=small("resnet50")))
    tsm = OptimizerSettings(
        name="momentum", lr=0.02, momentum=0.9, betas=None, eps=None, weight_decay=1e-4, bias_lr=2.0, classifier_lr=5.0
    )
    plain = build_optimizer(model, dataclasses.replace(tsm, bias_lr=None, classifier_lr=None), 128)
    optimizer = build_optimizer(model, tsm, 128)
    build_schedule(optimizer, ScheduleSettings(name="constant", warmup_epochs=0), 10).step_update(3)
    by_parameter = {p: group for group in optimizer.param_groups for p in group["params"]}
    decays = {p: group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    assert len(by_parameter) == len(list(model.parameters()))
    for part, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            is_head = part in ("fc", "class_embeddings") or part.startswith("projections.4")
            is_bias = kind == "bias" and module.weight.ndim > 1
            assert by_parameter[parameter]["lr"] == pytest.approx(0.02 * (5 if is_head else 1) * (2 if is_bias else 1))
            assert by_parameter[parameter]["weight_decay"] == decays[parameter]


def test_generators_of_offsets_may_learn_at_another_rate():
    """All of their parameters, and no other."""
    model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=10))
    optimizer = build_optimizer(model, OptimizerSettings(generator_lr=3.0, bias_lr=2.0), 4096)
    scales = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: scales[p] for name, p in model.named_parameters()}
    assert len(names) == len(scales)
    generators = {name for name in names if ".weight_offset." in name or ".sampling_offset." in name}
    tripled = {name for name, scale in names.items() if scale in (3.0, 6.0)}
    assert tripled == generators
    assert {names[name] for name in generators if name.endswith("out.bias")} == {6.0}


def test_a_model_without_generators_refuses_a_rate_of_their_own():
    model = build_model(ModelSettings(name="resnet18", num_classes=3))
    with pytest.raises(UserError, match="no generators of offsets") as error:
        build_optimizer(model, OptimizerSettings(generator_lr=2.0), 1)
    assert error.value.fix == "optimizer.generator_lr=null"


@pytest.mark.parametrize("key", ["bias_lr", "classifier_lr", "generator_lr"])
def test_factors_of_the_learning_rate_are_above_0(key):
    with pytest.raises(UserError, match=key):
        OptimizerSettings(**{key: 0.0})


@pytest.mark.parametrize(("epochs", "warmup"), [(300, 20), (10, 3), (5, 0)])
def test_schedule_is_convnexts(epochs, warmup):
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    schedule = build_schedule(optimizer, ScheduleSettings(epochs=epochs, warmup_epochs=warmup), 7)
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
        optimizer = build_optimizer(model, OptimizerSettings(name=name, lr=0.1, **options), 4096)
        for gradient in gradients:
            for p in model.parameters():
                p.grad = torch.full_like(p, gradient)
            finite = torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
            if may_step(optimizer, finite):
                optimizer.step()
        return model.weight.detach()

    nan, inf = float("nan"), float("inf")
    assert torch.equal(trained([0.5, nan, -0.25, inf, 1.0]), trained([0.5, -0.25, 1.0]))
    assert not torch.equal(trained([0.5]), trained([0.5, 0.25]))


@pytest.mark.parametrize(
    "options", [dict(name="admw"), dict(name="sgd", betas=[0.9, 0.99]), dict(name="adamw", momentum=0.9)]
)
def test_unknown_optimizers_and_options_are_refused(options):
    with pytest.raises(UserError):
        build_optimizer(torch.nn.Linear(2, 2), OptimizerSettings(**options), 4096)


RECIPE = dict(betas=[0.9, 0.999], eps=1e-8, momentum=None)


@pytest.mark.parametrize(("name", "lacking"), [("sgd", ["betas", "eps"]), ("lion", ["eps"]), ("rmsprop", ["betas"])])
def test_what_an_optimizer_lacks_is_named_at_once(name, lacking):
    with pytest.raises(UserError) as refused:
        build_optimizer(torch.nn.Linear(2, 2), OptimizerSettings(name=name, **RECIPE), 4096)
    assert refused.value.fix.split() == [f"optimizer.{key}=null" for key in lacking]
    build_optimizer(torch.nn.Linear(2, 2), OptimizerSettings(name=name, **RECIPE | dict.fromkeys(lacking)), 4096)


@pytest.mark.parametrize("name", ["adamw", "lion", "adan"])
@pytest.mark.parametrize("betas", [[0.9], [0.9, 1.0], [0.9, -0.1], [0.9, 0.9, 0.9], [0.9] * 4, [0.9, float("nan")], []])
def test_betas_are_as_many_as_the_optimizer_has_and_below_one(name, betas):
    if name == "adan" and len(betas) == 3:
        build_optimizer(torch.nn.Linear(2, 2), OptimizerSettings(name=name, betas=betas), 4096)
        return
    with pytest.raises(UserError, match="betas"):
        build_optimizer(torch.nn.Linear(2, 2), OptimizerSettings(name=name, betas=betas, eps=None), 4096)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("adamw", dict(eps=-1e-8)),
        ("sgd", dict(momentum=-0.9)),
        ("sgd", dict(momentum=1.0)),
        ("adamw", dict(eps=np.inf)),
    ],
)
def test_other_numbers_of_an_optimizer_are_in_range(name, numbers):
    with pytest.raises(UserError, match=next(iter(numbers))):
        build_optimizer(
            torch.nn.Linear(2, 2), OptimizerSettings(name=name, **dict(betas=None, eps=None) | numbers), 4096
        )


@pytest.mark.parametrize(("epochs", "warmup", "advice"), [(20, 20, 1), (5, 20, 1), (90, 90, 6), (300, 301, 20)])
def test_a_warm_up_as_long_as_the_run_is_refused_with_the_recipes_share(epochs, warmup, advice):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(UserError, match="warmup") as refused:
        build_schedule(optimizer, ScheduleSettings(epochs=epochs, warmup_epochs=warmup), 10)
    assert refused.value.fix == f"schedule.warmup_epochs={advice}"


def rates(steps_per_epoch, epochs, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(
        optimizer, ScheduleSettings(**dict(epochs=epochs, warmup_epochs=1, min_lr=0.0) | options), steps_per_epoch
    )
    found = []
    for step in range(epochs * steps_per_epoch):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_other_schedules_warm_up_and_take_their_shape():
    by_name = {
        "poly": rates(10, 5, name="poly", decay_rate=1.0),
        "step": rates(10, 5, name="step", decay_epochs=2),
        "wsd": rates(10, 5, name="wsd", decay_epochs=2),
        "constant": rates(10, 5, name="constant"),
        "tanh": rates(10, 5, name="tanh"),
    }
    for found in by_name.values():
        assert found[:10] == pytest.approx([i / 10 for i in range(10)])
    assert by_name["poly"][10:] == pytest.approx([1 - i / 40 for i in range(40)])
    assert by_name["step"][10:] == pytest.approx([1.0] * 20 + [0.1] * 20)
    assert by_name["wsd"][10:31] == pytest.approx([1.0] * 21)
    assert 1 > by_name["wsd"][31] > by_name["wsd"][-1] > 0
    assert by_name["constant"][10:] == [1.0] * 40
    assert all(b <= a for a, b in itertools.pairwise(by_name["tanh"][10:]))
    with pytest.raises(UserError, match="decay_epochs"):
        rates(10, 5, name="step", decay_epochs=5)


def test_milestones_count_from_the_start_and_begin_with_their_epochs_first_step():
    """TSM: a tenth after 20 and 40 of 50 epochs; Swin's and ConvNeXt's detectors warm up for 500 steps as well."""
    found = rates(10, 5, name="multistep", milestones=[2, 4], warmup_epochs=0, warmup_steps=5)
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 15 + [0.1] * 20 + [0.01] * 10)
    assert rates(7, 3, name="multistep", milestones=[1]) == pytest.approx([i / 7 for i in range(7)] + [0.1] * 14)


def test_a_warm_up_may_be_counted_in_steps():
    assert rates(10, 4, warmup_epochs=0, warmup_steps=10) == pytest.approx(rates(10, 4, warmup_epochs=1))
    assert rates(10, 4, warmup_epochs=0, warmup_steps=3)[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize(
    "options",
    [
        dict(name="multistep"),
        dict(milestones=[2]),
        dict(name="multistep", milestones=[4, 2]),
        dict(name="multistep", milestones=[5]),
        dict(warmup_steps=5),
        dict(warmup_epochs=0, warmup_steps=-1),
    ],
)
def test_milestones_and_warm_ups_that_contradict_are_refused(options):
    with pytest.raises(UserError, match=r"schedule\.(milestones|name|warmup_steps)"):
        rates(10, 5, **options)


@pytest.mark.parametrize(("scaling", "expected"), [("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_the_learning_rate_grows_with_the_global_batch_if_asked(scaling, expected):
    optimizer = build_optimizer(
        torch.nn.Linear(2, 2), OptimizerSettings(lr=0.1, lr_scaling=scaling, lr_base_size=256), 1024
    )
    assert {group["lr"] for group in optimizer.param_groups} == {expected}


def test_without_a_limit_the_norm_is_taken_and_no_gradient_is_written():
    model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=3))
    for parameter in list(model.parameters())[:-1]:  # one without a gradient
        parameter.grad = torch.randn_like(parameter)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    versions, values = [g._version for g in gradients], [g.clone() for g in gradients]
    norm = clip_gradients(model, None, "norm")
    assert [g._version for g in gradients] == versions
    assert all(torch.equal(gradient, value) for gradient, value in zip(gradients, values, strict=True))
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf))
    gradients[0][0] = torch.inf
    assert not torch.isfinite(clip_gradients(model, None, "norm"))


def test_gradients_are_clipped_in_three_ways():
    def clipped(limit, mode):
        torch.manual_seed(0)
        model = build_model(ModelSettings(name="convnext_atto", num_classes=3))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.cat([grad.flatten() for grad in before.values()]).norm()
        torch.testing.assert_close(clip_gradients(model, limit, mode), norm, rtol=1e-3, atol=0)
        return model, before, {name: p.grad for name, p in model.named_parameters()}

    _, before, after = clipped(None, "agc")
    assert all(torch.equal(after[name], before[name]) for name in before)
    _, _, after = clipped(0.5, "norm")
    assert torch.cat([grad.flatten() for grad in after.values()]).norm() == pytest.approx(0.5, rel=1e-4)
    _, before, after = clipped(0.5, "value")
    assert all(torch.equal(after[name], before[name].clamp(-0.5, 0.5)) for name in before)
    model, before, after = clipped(0.01, "agc")
    assert torch.equal(after["head.fc.weight"], before["head.fc.weight"])
    for name, parameter in model.named_parameters():
        parameter.grad = before[name]
    adaptive_clip_grad([p for name, p in model.named_parameters() if not name.startswith("head.fc")], 0.01)
    for name, parameter in model.named_parameters():
        assert torch.equal(after[name], parameter.grad), name

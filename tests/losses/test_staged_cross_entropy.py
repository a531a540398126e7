"""The staged loss against the paper's formula, sample by sample."""

import pytest
import torch
import torch.nn.functional as F

from contextual_cnn.contracts import StagedScores
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model
from contextual_cnn.settings.loss import LossSettings
from contextual_cnn.settings.model import ModelSettings
from tests.helpers import reference

B, N = 6, 8


def scores_of(considered_counts, seed=0, dtype=torch.float32):
    """Random logits of four stages, each keeping that many random classes of the stage before; and the sets."""
    g = torch.Generator().manual_seed(seed)
    logits, sets, kept = [], [], [set(range(N)) for _ in range(B)]
    for count in considered_counts:
        kept = [set(sorted(s, key=lambda _: torch.rand((), generator=g).item())[:count]) for s in kept]
        stage = torch.randn(B, N, generator=g, dtype=dtype) * 3
        for b, classes in enumerate(kept):
            stage[b, [j for j in range(N) if j not in classes]] = -torch.inf
        logits.append(stage.requires_grad_())
        sets.append(kept)
    return StagedScores(tuple(logits), (), tuple(range(1, 1 + len(logits)))), sets


def soft_targets(seed=1):
    g = torch.Generator().manual_seed(seed)
    lam = torch.rand(B, 1, generator=g)
    one, other = (F.one_hot(torch.randint(N, (B,), generator=g), N).float() for _ in range(2))
    return 0.9 * (lam * one + (1 - lam) * other) + 0.1 / N


@pytest.mark.parametrize("reduction", ["considered", "batch"])
@pytest.mark.parametrize("counts", [(8, 8, 8, 8), (8, 6, 4, 2), (8, 3, 2, 1)])
def test_equals_the_formula(counts, reduction):
    scores, sets = scores_of(counts)
    loss = StagedCrossEntropy(LossSettings(alpha=0.15, reduction=reduction))
    labels = torch.arange(B) % N
    logits = [stage.detach() for stage in scores.logits]
    for targets, dense in ((labels, F.one_hot(labels, N).float()), (soft_targets(), soft_targets())):
        expected = reference.staged_loss(logits, dense, sets, 0.15, reduction)
        assert loss(scores, targets).total.item() == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("reduction", ["considered", "batch"])
def test_all_classes_considered_is_plain_cross_entropy(reduction):
    scores, _ = scores_of((N,) * 4)
    labels = torch.randint(N, (B,))
    loss = StagedCrossEntropy(LossSettings(alpha=0.15, reduction=reduction))(scores, labels)
    for i, logits in enumerate(scores.logits, start=1):
        torch.testing.assert_close(loss.parts[f"loss_stage{i}"], F.cross_entropy(logits, labels))
    each = [F.cross_entropy(logits, labels) for logits in scores.logits]
    torch.testing.assert_close(loss.total, 0.15 * sum(each[:3]) + each[3])


@pytest.mark.parametrize("reduction", ["considered", "batch"])
def test_one_hot_soft_targets_equal_hard_targets(reduction):
    scores, _ = scores_of((8, 5, 3, 2))
    labels = torch.randint(N, (B,))
    loss = StagedCrossEntropy(LossSettings(reduction=reduction))
    torch.testing.assert_close(loss(scores, F.one_hot(labels, N).float()).total, loss(scores, labels).total)


def test_gradients_are_finite_and_zero_where_nothing_is_considered():
    scores, sets = scores_of((8, 4, 2, 1))
    StagedCrossEntropy()(scores, soft_targets()).total.backward()
    for logits, stage_sets in zip(scores.logits, sets, strict=True):
        assert logits.grad.isfinite().all()
        for b, classes in enumerate(stage_sets):
            assert not logits.grad[b, [j for j in range(N) if j not in classes]].any()


def test_no_considered_target_at_all_costs_nothing():
    logits = torch.full((B, N), -torch.inf)
    logits[:, 0] = 1.0
    loss = StagedCrossEntropy()(StagedScores.of(logits.requires_grad_()), torch.full((B,), 3))
    loss.total.backward()
    assert loss.total.item() == 0
    assert not logits.grad.any()


def test_nan_is_not_hidden():
    scores = StagedScores.of(torch.full((B, N), torch.nan))
    assert StagedCrossEntropy()(scores, torch.zeros(B, dtype=torch.int64)).total.isnan()


def test_a_model_without_stages_gets_plain_cross_entropy():
    logits, labels = torch.randn(B, N), torch.randint(N, (B,))
    loss = StagedCrossEntropy()(StagedScores.of(logits), labels)
    torch.testing.assert_close(loss.total, F.cross_entropy(logits, labels))
    assert list(loss.parts) == ["loss_stage4"]


@pytest.mark.parametrize(
    ("contextual", "named"),
    [((4,), (3, 4)), ((3, 4), (2, 3, 4)), ((2, 4), (1, 3, 4)), ((1, 2, 3, 4), (1, 2, 3, 4)), ((1,), (4,))],
)
def test_a_loss_is_named_by_the_stage_that_its_classification_follows(contextual, named):
    model = build_model(ModelSettings(name="contextual_convnext_atto", num_classes=N, contextual_stages=contextual))
    loss = StagedCrossEntropy()(model(torch.randn(2, 3, 32, 32)), torch.arange(2))
    assert list(loss.parts) == [f"loss_stage{stage}" for stage in named]

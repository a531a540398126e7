"""The classifying and merging steps against the paper's text, written out per sample and class."""

import pytest
import torch
import torch.nn.functional as F

from contextual_cnn.models.class_context import (
    ClassEmbeddings,
    Merging,
    Projection,
    check_class_counts,
    default_class_counts,
)


def test_scores_are_cosine_similarities_over_the_temperature():
    embeddings = ClassEmbeddings(num_classes=7, embedding_dim=16)
    v = torch.randn(3, 16)
    expected = F.cosine_similarity(v[:, None], embeddings.weight[None], dim=2) / 0.07
    torch.testing.assert_close(embeddings(v), expected)


def test_temperature_is_clamped_at_a_hundredth():
    embeddings = ClassEmbeddings(num_classes=7, embedding_dim=16)
    torch.nn.init.constant_(embeddings.log_inverse_temperature, 50.0)
    assert embeddings(torch.randn(3, 16)).abs().max() <= 100 + 1e-4


def test_a_batch_norm_takes_out_of_the_projection_what_all_images_share():
    maps = torch.randn(64, 1) * 0.1 + 5 * torch.randn(1, 32)  # pooled features that differ little
    maps = (maps + 0.1 * torch.randn(64, 32))[:, :, None, None]

    def mean_similarity(norm):
        torch.manual_seed(0)
        vectors = F.normalize(Projection(32, 16, norm)(maps), dim=1)
        return (vectors @ vectors.T).mean()

    assert mean_similarity("layer") > 0.95
    assert mean_similarity("batch") < 0.7


def test_one_image_alone_is_projected_by_the_running_statistics():
    projection = Projection(32, 16, "batch")
    projection(torch.randn(8, 32, 2, 2))
    alone = torch.randn(1, 32, 2, 2)
    torch.testing.assert_close(projection.train()(alone), projection.eval()(alone))


def test_merging_equals_the_gathered_form():
    """FC, LN, ReLU on each kept class's embedding, mean over them, FC, LN, ReLU (section 3.2)."""
    merging = Merging(embedding_dim=16)
    table = torch.randn(7, 16, requires_grad=True)
    shortlist = torch.tensor([[0, 3, 6], [2, 1, 5]])
    context = merging(table, shortlist)
    gathered = torch.stack([merging.after(merging.before(table[kept]).mean(dim=0)) for kept in shortlist])
    torch.testing.assert_close(context, gathered)
    ours = torch.autograd.grad(context.sum(), table, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(gathered.sum(), table))


def test_default_class_counts_are_the_papers_scaled():
    assert default_class_counts(1000) == (500, 200, 50)
    assert default_class_counts(100) == (50, 20, 5)
    for num_classes in range(4, 3000):
        counts = default_class_counts(num_classes)
        check_class_counts(num_classes, counts)
        assert counts[-1] >= 2 or num_classes == 4


@pytest.mark.parametrize("counts", [(11, 5, 2), (5, 5, 2), (5, 2, 3), (5, 2, 0), (5, 2), ()])
def test_class_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match="class_counts"):
        check_class_counts(10, counts)

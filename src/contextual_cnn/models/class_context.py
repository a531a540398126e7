"""Classes as context (sections 3.1, 3.2): class embeddings, the classifying step and the merging step.

Shapes: B images, C channels of a stage, N classes, k classes kept, E embedding size, D context size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contextual_cnn.contracts import at_least_float32
from contextual_cnn.settings.model import ContextInit, Norm

FEWEST_CLASSES = 3  # as many as shortlists, each shorter than the one before
_MAX_INVERSE_TEMPERATURE = 100.0  # CLIP's clamp


class ClassEmbeddings(nn.Module):
    """One table of class embeddings and one temperature, shared by all stages (section 3.1, "following CLIP").

    Scores are one (B, E) x (E, N) product. The paper's text gathers a (B, k, E) tensor instead; the numbers are
    the same and the tensor is not needed.
    """

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding_dim, num_classes  # as of the linear layer it stands for
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        # kept as a logarithm, so that the temperature stays positive (CLIP); starts at tau = 0.07
        self.log_inverse_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, projected: Tensor) -> Tensor:
        """(B, E) visual vectors -> (B, N) float32 logits: cosine similarity over the temperature."""
        # float32 always: the inverse temperature multiplies a rounding of bfloat16 by up to 100
        with torch.autocast(projected.device.type, enabled=False):
            scale = at_least_float32(self.log_inverse_temperature).exp().clamp(max=_MAX_INVERSE_TEMPERATURE)
            vectors, embeddings = (F.normalize(at_least_float32(x), dim=-1) for x in (projected, self.weight))
            return scale * (vectors @ embeddings.T)


class Projection(nn.Sequential):
    """A stage's map to the space of the class embeddings: GAP, FC, norm, ReLU, FC (section 3.2, classifying).

    Args:
        norm: "layer" (the paper) or "batch" (the released code's ResNet). Pooled features of different images point
            almost the same way at first, and the cosine sees nothing else; a layer norm leaves that, a batch norm
            takes out what all images share. Why it is the default: docs/evidence.md.
        hidden: width between the two FC; None is C.
    """

    def __init__(self, channels: int, embedding_dim: int, norm: Norm, hidden: int | None = None) -> None:
        hidden = hidden or channels
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, hidden),
            vector_norm(norm, hidden),
            nn.ReLU(),
            nn.Linear(hidden, embedding_dim),
        )


def vector_norm(norm: Norm, features: int) -> nn.Module:
    """Of (B, features): "layer", over each image's features, or "batch", of each feature over the images."""
    return _BatchNorm(features) if norm == "batch" else nn.LayerNorm(features)


class _BatchNorm(nn.BatchNorm1d):
    """One image alone, which has no variance, is normalised by the running statistics in training mode too."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Merging(nn.Module):
    """The embeddings of the kept classes to one context vector: FC, LN, ReLU, mean, FC, LN, ReLU (section 3.2).

    The first FC sees one class at a time, so it runs once over the table instead of once per image and class;
    the mean over an image's shortlist is then a product with a (B, N) matrix of 0 and 1/k.

    Args:
        norm: the last one. "layer" (the paper) leaves what the contexts of all images share, "batch" takes it out.
        context_dim: width of the context, D; None is E (the paper).
    """

    def __init__(self, embedding_dim: int, norm: Norm = "layer", context_dim: int | None = None) -> None:
        super().__init__()
        context_dim = context_dim or embedding_dim
        hidden = max(embedding_dim // 4, 128)  # released code
        self.before = nn.Sequential(nn.Linear(embedding_dim, hidden), nn.LayerNorm(hidden), nn.ReLU())
        self.after = nn.Sequential(nn.Linear(hidden, context_dim), vector_norm(norm, context_dim), nn.ReLU())

    def forward(self, embeddings: Tensor, shortlist: Tensor, scores: Tensor | None = None) -> Tensor:
        """(N, E) table and (B, k) kept classes -> (B, D) context.

        Args:
            scores: (B, N) logits; the mean is weighted by their softmax over the shortlist, so that the context has a
                gradient to the ranking. Without them all kept classes weigh the same (the paper).
        """
        table = self.before(embeddings)  # (N, h)
        share = table.new_zeros(shortlist.shape[0], table.shape[0])
        if scores is None:
            share = share.scatter_(1, shortlist, 1 / shortlist.shape[1])
        else:
            share = share.scatter(1, shortlist, scores.gather(1, shortlist).softmax(dim=1).to(share.dtype))
        return self.after(share @ table)


def initialize(modules: nn.Module, init: ContextInit) -> None:
    """The linear layers of projections and mergings.

    Args:
        init: "uniform" is torch's own (and the released ResNet's); "trunc_normal" the released ConvNeXt's, standard
            deviation 0.02 and no bias. The class embeddings are as small, so that torch's biases make up 90 % of what
            merging makes of a class at first, and all contexts start almost the same.
    """
    for module in modules.modules():
        if init == "trunc_normal" and isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def default_class_counts(num_classes: int) -> tuple[int, int, int]:
    """The paper's (500, 200, 50) of 1000 (section 4.3), scaled to another number of classes."""
    return scale_class_counts((500, 200, 50), 1000, num_classes)


def scale_class_counts(counts: tuple[int, ...], of: int, num_classes: int) -> tuple[int, int, int]:
    """Class counts of so many classes for another number of classes: the same shares of it.

    Kept strictly decreasing and, where there are five classes or more, at least 2 at the end.
    """
    first, middle, last = (round(count * num_classes / of) for count in counts)
    last = max(2 if num_classes > 4 else 1, last)
    middle = max(last + 1, middle)
    first = min(max(middle + 1, first), num_classes)
    middle = min(middle, first - 1)
    return first, middle, min(last, middle - 1)


class ClassCountError(ValueError):
    """Class counts that do not fit the number of classes."""


def check_class_counts(num_classes: int, counts: tuple[int, ...]) -> None:
    """Raises ClassCountError unless N1 >= N2 > N3 > N4 >= 1."""
    if num_classes < FEWEST_CLASSES:
        raise ClassCountError(f"a contextual model needs {FEWEST_CLASSES} classes or more, these are {num_classes}")
    if len(counts) != 3:
        raise ClassCountError(f"class_counts must be three numbers (N2, N3, N4), got {list(counts)}")
    n2, n3, n4 = counts
    if not num_classes >= n2 > n3 > n4 >= 1:
        raise ClassCountError(
            f"class_counts must fall from stage to stage, {num_classes} >= N2 > N3 > N4 >= 1, got {list(counts)}"
        )

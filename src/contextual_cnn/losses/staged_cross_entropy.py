"""The staged loss (section 3.1, equations 1 and 2): L = alpha (L1 + L2 + L3) + L4.

    L_i = -sum over the considered classes j of  t(j) log softmax over the considered classes (s_i / tau)(j)

For one-hot targets t this is the paper's formula: zero where the true class is not considered.
No loop over samples and no wait for the device.

Shapes: B images, N classes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from contextual_cnn.contracts import StagedLoss, StagedScores, is_considered, stage_name
from contextual_cnn.errors import UserError

Reduction = Literal["considered", "batch"]


class StagedCrossEntropy(nn.Module):
    """Cross-entropy of every stage; a model with a single stage gets the plain cross-entropy.

    Args:
        alpha: weight of all stages but the last (paper: 0.15).
        reduction: what the paper leaves open. "considered": the mean over the samples whose target is
            considered (released code), each counted by the share of its target that is. "batch": the mean
            over the batch, equation 1 read literally. They differ only where classes have been dropped.
    """

    def __init__(self, *, alpha: float = 0.15, reduction: Reduction = "considered") -> None:
        super().__init__()
        if not alpha >= 0:  # a NaN neither
            raise UserError(f"loss.alpha must not be negative, got {alpha}", "the paper's value is loss.alpha=0.15")
        self.alpha = alpha
        self.reduction = reduction

    def forward(self, scores: StagedScores, targets: Tensor) -> StagedLoss:
        """Scores of every stage, and (B,) classes or (B, N) probabilities -> total, and each stage's as loss_stageS."""
        losses = [self._stage_loss(logits, targets) for logits in scores.logits]
        total = self.alpha * sum(losses[:-1]) + losses[-1]
        named = zip(scores.stages, losses, strict=True)
        return StagedLoss(total, {stage_name("loss", stage): loss.detach() for stage, loss in named})

    def _stage_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        considered = is_considered(logits)
        # Dropped classes have log-probability -inf: taken out before they meet a zero target and make a NaN
        log_p = torch.log_softmax(logits, dim=1).masked_fill(~considered, 0.0)
        if targets.ndim == 1:
            target = targets.unsqueeze(1)
            loss = -log_p.gather(1, target).squeeze(1)
            share = considered.gather(1, target).squeeze(1).to(loss.dtype)
        else:
            loss = -(targets * log_p).sum(dim=1)
            share = (targets * considered).sum(dim=1)
        if self.reduction == "batch":
            return loss.mean()
        # With no considered target in the batch both sums are zero, and so is the loss
        return loss.sum() / share.sum().clamp(min=torch.finfo(loss.dtype).tiny)

"""The staged loss (section 3.1, equations 1 and 2): L = alpha (L1 + L2 + L3) + L4.

    L_i = -sum over the considered classes j of  t(j) log softmax over the considered classes (s_i / tau)(j)

For one-hot targets t this is the paper's formula: zero where the true class is not considered.
No loop over samples and no wait for the device.

Shapes: B images, N classes.
"""

import torch
from torch import Tensor, nn

from contextual_cnn.contracts import StagedLoss, StagedScores, at_least_float32, is_considered, stage_name
from contextual_cnn.settings.loss import LossSettings


class StagedCrossEntropy(nn.Module):
    """Cross-entropy of every stage; a model with a single stage gets the plain cross-entropy."""

    def __init__(self, settings: LossSettings | None = None) -> None:
        super().__init__()
        self._settings = settings or LossSettings()

    def forward(self, scores: StagedScores, targets: Tensor) -> StagedLoss:
        """Scores of every stage, and (B,) classes or (B, N) probabilities -> total, and each stage's as loss_stageS."""
        losses = [self._stage_loss(logits, targets) for logits in scores.logits]
        total = self._settings.alpha * sum(losses[:-1]) + losses[-1]
        named = zip(scores.stages, losses, strict=True)
        return StagedLoss(total, {stage_name("loss", stage): loss.detach() for stage, loss in named})

    def _stage_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = at_least_float32(logits)
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
        if self._settings.reduction == "batch":
            return loss.mean()
        # With no considered target in the batch both sums are zero, and so is the loss
        return loss.sum() / share.sum().clamp(min=torch.finfo(loss.dtype).tiny)

"""Losses: staged scores and targets to a total and its named parts."""

from contextual_cnn.losses.staged_cross_entropy import StagedCrossEntropy

__all__ = ["StagedCrossEntropy"]

"""timm's RandAugment and color jitter: one definition of what is drawn, carried out by PIL, torch or DALI."""

from contextual_cnn.data.randaugment.policy import ColorJitter, ImageOps, RandAugment

__all__ = ["ColorJitter", "ImageOps", "RandAugment"]

"""From images on disk to batches on the device."""

from contextual_cnn.data.augmentation import Augmentation
from contextual_cnn.data.image_data import ImageData

__all__ = ["Augmentation", "ImageData"]

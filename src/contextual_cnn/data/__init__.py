"""From images on disk to batches on the device."""

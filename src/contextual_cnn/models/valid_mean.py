"""Means over a map: of all of it, or of the part that belongs to an image where the rest is padding.

A contextual model takes means over whole maps, for its classifications and for the weights of its convolutions. Where
images of different sizes share a padded batch, each would change with the size of the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GlobalMean(nn.Module):
    """(B, C, H, W) -> (B, C), over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class ValidPart:
    """The part of each image that is not padding; one for all means of a model, told before each forward pass.

    shares: (height, width) of each image as parts of the padded height and width; None without padding.
    """

    def __init__(self) -> None:
        self.shares: list[tuple[float, float]] | None = None

    def tell(self, sizes: Sequence[tuple[int, int]], padded: tuple[int, int]) -> None:
        """Sizes of the images, and the size of the batch, in pixels."""
        is_padded = any(tuple(size) != tuple(padded) for size in sizes)
        self.shares = [(height / padded[0], width / padded[1]) for height, width in sizes] if is_padded else None


class ValidMean(GlobalMean):
    """(B, C, H, W) -> (B, C), over the positions that are at least partly the image's own."""

    def __init__(self, valid: ValidPart) -> None:
        super().__init__()
        self._valid = valid

    def forward(self, x: Tensor) -> Tensor:
        if self._valid.shares is None:
            return super().forward(x)
        height, width = x.shape[2:]
        shares = x.new_tensor(self._valid.shares, dtype=torch.float32)
        rows, columns = (shares * shares.new_tensor([height, width]) - 1e-3).ceil().clamp(min=1).unbind(1)
        own_rows = torch.arange(height, device=x.device) < rows[:, None]
        own_columns = torch.arange(width, device=x.device) < columns[:, None]
        own = own_rows[:, None, :, None] & own_columns[:, None, None, :]  # (B, 1, H, W)
        return x.masked_fill(~own, 0).sum(dim=(2, 3)) / (rows * columns)[:, None].to(x.dtype)

"""Conversion of pixels to the input of a network."""

from __future__ import annotations

import torch
from torch import Tensor


class Normalize:
    """Converts pixels (B, H, W, C) in 0..255 to float32 (B, C, H, W) of mean 0 and std 1.

    Args:
        mean: mean per channel, of pixels scaled to [0, 1].
        std: standard deviation per channel.
        device: the device of the pixels.
        channels_last: memory format of the result.
        prepared: whether images come as float32 (B, C, H, W), of which only the memory format is
            changed; or windows of a text, int64 (B, T), which stay as they are.

    Example:
        >>> Normalize((0.5,), (0.5,))(torch.full((1, 1, 1, 1), 255)).round()
        tensor([[[[1.]]]])
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device | str = "cpu",
        channels_last: bool = True,
        prepared: bool = False,
    ) -> None:
        self.prepared = prepared
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        deviation = torch.tensor(std, device=device)
        self.scale = 1 / (255 * deviation)
        self.offset = -torch.tensor(mean, device=device) / deviation

    def __call__(self, pixels: Tensor) -> Tensor:
        """Convert a batch."""
        if self.prepared:
            if pixels.ndim != 4:
                return pixels
            return pixels.contiguous(memory_format=self.layout)
        images = torch.addcmul(self.offset, pixels.float(), self.scale).permute(0, 3, 1, 2)
        return images.contiguous(memory_format=self.layout)

"""Random resized crops: a box of random area and shape per image, scaled to one size.

The boxes follow Szegedy et al., "Going Deeper with Convolutions", section 6, in the form that has
become the custom for ImageNet: the area uniform, the aspect ratio log-uniform in [3/4, 4/3].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TRIES = 10
DRAWS = 2 * TRIES + 2  # uniform numbers that one box takes
RATIOS = (3 / 4, 4 / 3)  # width over height


def random_boxes(uniform: Tensor, height: int, width: int, smallest: float) -> Tensor:
    """Boxes inside an image of `height` x `width` pixels.

    Args:
        uniform: (N, DRAWS) of float64 in [0, 1).
        height, width: of the images.
        smallest: least share of the image's area; the largest is 1.

    Returns:
        int64 (N, 4): top, left, height, width. An image where none of ten boxes fits, because it
        is long or `smallest` is near 1, gets the largest box of an allowed ratio at its centre.
    """
    area = height * width * (smallest + (1 - smallest) * uniform[:, :TRIES])
    low, high = (math.log(ratio) for ratio in RATIOS)
    ratio = torch.exp(low + (high - low) * uniform[:, TRIES : 2 * TRIES])
    heights, widths = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = (fits.cumsum(1) == 0).sum(1, keepdim=True)  # TRIES where none fits

    last = torch.tensor(
        [[min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1]))]],
        dtype=uniform.dtype,
    ).expand(len(uniform), 2)
    h = torch.cat([heights, last[:, :1]], 1).gather(1, first)[:, 0]
    w = torch.cat([widths, last[:, 1:]], 1).gather(1, first)[:, 0]
    top = (uniform[:, -2] * (height - h + 1)).floor()
    left = (uniform[:, -1] * (width - w + 1)).floor()
    none = first[:, 0] == TRIES
    top = torch.where(none, ((height - h) / 2).floor(), top)
    left = torch.where(none, ((width - w) / 2).floor(), left)
    return torch.stack([top, left, h, w], 1).long()


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (H, W, C), scaled bilinearly; where it shrinks, pixels are averaged (antialiased)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = pixels.permute(2, 0, 1)[None]
    scaled = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0)


def resize_boxes(pixels: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Of each image its box, scaled like `resize` and mirrored where asked for.

    Args:
        pixels: uint8 (B, H, W, C).
        boxes: int64 (B, 4): top, left, height, width.
        mirrored: bool (B,).
        size: pixels a side of the result.

    Returns:
        (B, size, size, C) in 0..255: uint8 on the CPU, else float32 and not rounded.
    """
    if pixels.device.type == "cpu":
        return _one_by_one(pixels, boxes, mirrored, size)
    return _products(pixels, boxes, mirrored, size)


def _one_by_one(pixels: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """A fifth of the time of `_products` on a CPU core, for images of 128 pixels a side."""
    scaled = pixels.new_empty(len(pixels), size, size, pixels.shape[3])
    for image, (top, left, high, wide), flip, target in zip(
        pixels, boxes.tolist(), mirrored.tolist(), scaled, strict=True
    ):
        part = resize(image[top : top + high, left : left + wide], size, size)
        target.copy_(part.flip(1) if flip else part)
    return scaled


def _products(pixels: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Two matrix products for the whole batch, without waiting for the device.

    Interpolation between pixels is linear, and acts on rows and on columns separately.
    """
    _, height, width, _ = pixels.shape
    top, left, high, wide = boxes.unbind(1)
    rows = _weights(top, high, height, size)
    columns = _weights(left, wide, width, size)
    columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    planes = pixels.permute(0, 3, 1, 2).float()  # (B, C, H, W)
    scaled = rows[:, None] @ (planes @ columns.mT[:, None])
    return scaled.permute(0, 2, 3, 1)


def _weights(start: Tensor, length: Tensor, count: int, size: int) -> Tensor:
    """float32 (B, size, count): how much each of `count` pixels adds to each one of the result.

    A triangle around the place in the box that a pixel of the result comes from; as wide as such
    a pixel where the box shrinks, and as wide as a pixel of the image where it grows.
    """
    device = start.device
    scale = (length / size)[:, None, None]
    places = torch.arange(size, device=device)[:, None] + 0.5
    pixels = torch.arange(count, device=device) - start[:, None, None]  # from the box's edge
    distance = (pixels + 0.5 - places * scale).abs()
    weights = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixels >= 0) & (pixels < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)

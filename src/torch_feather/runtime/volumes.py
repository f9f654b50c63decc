"""Three-dimensional convolutions, as two-dimensional ones whose channels are all slices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Layer
from .taps import Taps


@dataclass(eq=False)
class VolumeConvolution(Layer):
    """A three-dimensional convolution; see `torch.nn.Conv3d`.

    Its weight is (out, in / groups, depth, height, width). In memory, the slices of a channel
    follow each other like channels. So the layer is a two-dimensional convolution from in · depth
    to out · depth channels, `kernel_form`, whose nonzero weights are those of this layer for each
    slice of the result.

    Args:
        depth: slices of the input.
        depth_stride: of slices.
        depth_padding: slices of zeros before the first slice and after the last one.
        depth_dilation: of slices.

    Example:
        >>> weight = torch.ones(2, 1, 3, 3, 3)
        >>> layer = VolumeConvolution("weight", weight, torch.zeros(2), depth=5)
        >>> layer(torch.ones(1, 1, 5, 6, 7)).shape, layer.kernel_form.channels
        (torch.Size([1, 2, 3, 4, 5]), (5, 6))
    """

    depth: int = 1
    depth_stride: int = 1
    depth_padding: int = 0
    depth_dilation: int = 1
    _form: Layer | None = field(default=None, init=False, repr=False)
    __name__: ClassVar[str] = "volume_convolution"

    def _combined(self, x: Tensor) -> Tensor:
        self.fold()
        return F.conv3d(
            *(x, self.weight, self.bias),
            (self.depth_stride, *self.stride),
            (self.depth_padding, *self.padding),
            (self.depth_dilation, *self.dilation),
            self.groups,
        )

    @property
    def slices(self) -> int:
        """Number of slices of the result."""
        reach = self.depth_dilation * (self.weight.shape[2] - 1)
        return (self.depth + 2 * self.depth_padding - reach - 1) // self.depth_stride + 1

    @property
    def kernel_form(self) -> Layer:
        """The two-dimensional convolution."""
        if self._form is None:
            self._form = self._find_form()
        return self._form

    def _find_form(self) -> Layer:
        out, per_group, _, *kernel = self.weight.shape
        slices = self.slices
        shape = (out * slices, per_group * self.depth, *kernel)
        form = Layer(
            self.name,
            torch.zeros(()).expand(shape),  # only its shape is used
            self.bias.repeat_interleave(slices),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.low,
            self.high,
            self.activation,
        )
        weight = self.folded_weight().numpy()
        o, c, kz, ky, kx = weight.nonzero()
        values = weight[o, c, kz, ky, kx]
        c = c + o // (out // self.groups) * per_group
        z_out = np.arange(slices)[:, None]
        z = z_out * self.depth_stride + kz * self.depth_dilation - self.depth_padding
        is_inside = (z >= 0) & (z < self.depth)
        channel = (o * slices + z_out)[is_inside]
        key = (((c * self.depth + z) * kernel[0] + ky) * kernel[1] + kx)[is_inside]
        order = np.lexsort((key, channel))
        values = np.broadcast_to(values, z.shape)[is_inside][order]
        counts = np.bincount(channel, minlength=form.channels[1])
        form.taps = Taps.from_keys(form, np.ascontiguousarray(values), counts, key[order])
        return form

"""Transposed convolutions, as convolutions whose results are interleaved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Layer
from .taps import Taps

MAX_STRIDE = 4  # there is a kernel for each


@dataclass(eq=False)
class TransposedConvolution(Layer):
    """A transposed convolution; see `torch.nn.ConvTranspose2d`.

    Its weight is (out, in / groups, height, width), with the first two dimensions of PyTorch's
    weight exchanged within each group.

    For a stride (a, b), the pixels of the result with equal (row mod a, column mod b) are the
    result of a convolution of stride 1, whose kernel consists of every a-th row and b-th column of
    this one. These a·b convolutions are one layer with a·b times as many output channels,
    `kernel_form`, whose result is interleaved ("pixel shuffle"). It has the same nonzero weights.

    Args:
        output_padding: rows and columns that are added to the result at its end.

    Example:
        >>> layer = TransposedConvolution(
        ...     "weight", torch.ones(1, 1, 2, 2), torch.zeros(1), stride=(2, 2)
        ... )
        >>> layer(torch.ones(1, 1, 3, 3)).shape, layer.kernel_form.weight.shape
        (torch.Size([1, 1, 6, 6]), torch.Size([4, 1, 1, 1]))
    """

    output_padding: tuple[int, int] = (0, 0)
    _form: Layer | None = field(default=None, init=False, repr=False)
    adds: ClassVar[bool] = False
    __name__: ClassVar[str] = "transposed_convolution"

    def _combined(self, x: Tensor) -> Tensor:
        if self._packed is None:
            self._packed = swapped(self.folded_weight(), self.groups).contiguous()
        assert isinstance(self._packed, Tensor)
        return F.conv_transpose2d(
            *(x, self._packed, self.bias, self.stride, self.padding, self.output_padding),
            *(self.groups, self.dilation),
        )

    @property
    def kernel_form(self) -> Layer:
        """The layer with stride·stride times as many output channels."""
        if self._form is None:
            self._form = self._find_form()
        return self._form

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the result for an input of a size."""
        reach, more = _reach(self), self.output_padding
        y, x = (
            (n - 1) * self.stride[i] - 2 * self.padding[i] + reach[i] + more[i] + 1
            for i, n in enumerate((height, width))
        )
        return y, x

    def _find_form(self) -> Layer:
        count = self.stride[0] * self.stride[1]
        axes = [_Axis.of(self, axis) for axis in (0, 1)]
        out, per_group = self.weight.shape[:2]
        shape = (out * count, per_group, *(a.size for a in axes))
        form = Layer(
            self.name,
            torch.zeros(()).expand(shape),  # only its shape is used
            self.bias.repeat_interleave(count),
            padding=(axes[0].before, axes[1].before),
            padding_after=(axes[0].after, axes[1].after),
            groups=self.groups,
            low=self.low,
            high=self.high,
            activation=self.activation,
        )
        weight = self.folded_weight().numpy()
        o, c, ky, kx = weight.nonzero()
        values = weight[o, c, ky, kx]
        c = c + o // (out // self.groups) * per_group
        channel = o * count + axes[0].phase[ky] * self.stride[1] + axes[1].phase[kx]
        key = (c * axes[0].size + axes[0].place[ky]) * axes[1].size + axes[1].place[kx]
        order = np.lexsort((key, channel))
        counts = np.bincount(channel, minlength=form.channels[1])
        form.taps = Taps.from_keys(form, values[order], counts, key[order])
        return form


@dataclass(frozen=True)
class _Axis:
    """How the rows (or columns) of a kernel are distributed over the phases of the result.

    Attributes:
        phase: phase of the result to which each row of the kernel contributes.
        place: its row in the kernel of this phase.
        size: rows of the kernels of all phases.
        before: padding of the input before the first row.
        after: padding after the last row.
    """

    phase: np.ndarray
    place: np.ndarray
    size: int
    before: int
    after: int

    @classmethod
    def of(cls, layer: TransposedConvolution, axis: int) -> _Axis:
        stride, padding = layer.stride[axis], layer.padding[axis]
        # Pixel i of the input contributes to pixel i · stride + distance of the result.
        distance = np.arange(layer.weight.shape[2 + axis]) * layer.dilation[axis] - padding
        shift, phase = np.divmod(distance, stride)
        before = int(shift.max())
        place = before - shift
        size = int(place.max()) + 1
        # The phases have as many pixels as the longest one, which is the first.
        pixels = -(-layer.size(1, 1)[axis] // stride)
        return cls(phase, place, size, before, pixels - 1 - before + size - 1)


def _reach(layer: Layer) -> list[int]:
    return [d * (k - 1) for d, k in zip(layer.dilation, layer.weight.shape[2:], strict=True)]


def swapped(weight: Tensor, groups: int) -> Tensor:
    """Return a weight with input and output channels exchanged within each group.

    Args:
        weight: (a, b / groups, ...).
        groups: number of groups.

    Returns:
        A tensor (b, a / groups, ...).

    Example:
        >>> swapped(torch.ones(6, 2, 3, 3), groups=3).shape
        torch.Size([6, 2, 3, 3])
    """
    parts = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return parts.flatten(0, 1)


def transposed_convolution(
    name: str,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Layer | None:
    """Return the layer of a transposed convolution, see `torch.nn.ConvTranspose2d`.

    With stride 1 it is a convolution with a flipped kernel.

    Args:
        name: name of the weight.
        weight: (in, out / groups, height, width), as in PyTorch.
        bias: (out,).
        stride: of rows and columns.
        padding: rows and columns that are dropped at each side of the result.
        output_padding: rows and columns that are added at its end.
        dilation: of rows and columns.
        groups: groups of channels.

    Returns:
        None if there is no kernel for the stride.

    Example:
        >>> layer = transposed_convolution(
        ...     "weight", torch.ones(2, 3, 3, 3), torch.zeros(3), stride=(1, 1), padding=(0, 0),
        ...     output_padding=(0, 0), dilation=(1, 1), groups=1,
        ... )
        >>> layer.padding
        (2, 2)
    """
    weight = swapped(weight, groups)
    if stride == (1, 1):
        layer = Layer(name, weight.flip(2, 3), bias, dilation=dilation, groups=groups)
        reach = _reach(layer)
        before = (reach[0] - padding[0], reach[1] - padding[1])
        after = (before[0] + output_padding[0], before[1] + output_padding[1])
        return layer.with_padding(before, after)
    if max(stride) > MAX_STRIDE:
        return None
    return TransposedConvolution(
        name, weight.contiguous(), bias, stride, padding, dilation, groups,
        output_padding=output_padding,
    )  # fmt: skip

"""A convolution or linear layer with all that is fused into it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class Layer:
    """y = clamp(conv(x) + bias + residual, low, high); calling it computes that densely.

    Args:
        name: of the weight in the model.
        weight: (out, in / groups, height, width), or (out, in) of a linear layer.
        bias: (out,).
        stride, padding, dilation: rows and columns.
        low, high: bounds of the result: 0 and inf for ReLU.
    """

    name: str
    weight: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    low: float = -math.inf
    high: float = math.inf
    _packed: Tensor | bool | None = field(default=None, init=False, repr=False)
    combine: ClassVar[str] = "fma"
    outside: ClassVar[float] = 0.0  # what is seen around an image
    __name__: ClassVar[str] = "layer"  # what torch.fx calls a function by

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See the class.

        Args:
            x: (batch, in, height, width), or (..., in) of a linear layer.
            residual: of the result's shape.
        """
        y = self._combined(x)
        if residual is not None:
            y += residual
        if self.low == 0.0 and self.high == math.inf:
            return y.relu_()
        if self.low > -math.inf or self.high < math.inf:
            return y.clamp_(self.low, self.high)
        return y

    def unpack(self) -> None:
        """Give back the memory of what only dense calls need; another call takes it again."""
        self._packed = None

    def _combined(self, x: Tensor) -> Tensor:
        if self.linear:
            return F.linear(x, self.weight, self.bias)
        if self._packed is None:
            self._packed = pack(self)
        if self._packed is not False:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self._packed, self.bias, self.padding, self.stride, self.dilation, self.groups,
                "none", [], "",
            )  # fmt: skip
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    @property
    def linear(self) -> bool:
        """Whether the channels are the last dimension, not the second."""
        return self.weight.dim() == 2

    @property
    def channels(self) -> tuple[int, int]:
        """Of the input and of the result."""
        return self.weight.shape[1] * self.groups, self.weight.shape[0]

    @property
    def sparsity(self) -> float:
        """Share of the weights that is zero."""
        return 1.0 - int(torch.count_nonzero(self.weight)) / max(1, self.weight.numel())

    def scaled(self, factor: Tensor, shift: Tensor | None = None) -> Layer:
        """With the result times `factor` plus `shift`, both (out,); rounded once."""
        weight, bias, factor = self.weight.double(), self.bias.double(), factor.double()
        bias = bias * factor + (0.0 if shift is None else shift.double())
        weight = weight * factor.view(-1, *[1] * (weight.dim() - 1))
        dtype = self.weight.dtype
        return replace(self, weight=weight.to(dtype), bias=bias.to(dtype))


class MaxPool(Layer):
    """The largest pixel of each window; the weights say nothing but its size."""

    combine = "max"
    outside = -math.inf
    __name__ = "max_pool"

    @classmethod
    def of(
        cls,
        name: str,
        channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> MaxPool:
        """Of each channel by itself."""
        weight = torch.ones(channels, 1, *kernel, dtype=torch.float32, device="cpu")
        lowest = weight.new_full((channels,), -math.inf)
        return cls(name, weight, lowest, stride, padding, dilation, channels)

    def _combined(self, x: Tensor) -> Tensor:
        size = self.weight.shape[2:]
        return F.max_pool2d(x, size, self.stride, self.padding, self.dilation)


def pack(layer: Layer) -> Tensor | bool:
    """The weights as oneDNN wants them, so that it need not bring them there at every call.

    PyTorch has this for its own compiler, without a promise to keep it; False where it is not.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.weight.shape[2:], strict=True)]
    if any(p > r for p, r in zip(layer.padding, reach, strict=True)):
        return False  # it may crash where a window sees nothing but padding
    try:
        return torch.ops.mkldnn._reorder_convolution_weight(
            layer.weight, layer.padding, layer.stride, layer.dilation, layer.groups, []
        )
    except (AttributeError, RuntimeError, TypeError):
        return False

"""Convolution, linear and max-pooling layers with the operations that are fused into them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class Layer:
    """A layer: y = activation(clamp(conv(x) + bias + residual, low, high)).

    It is a convolution or a linear layer.

    Calling it computes y densely, with PyTorch.

    Factors of the output channels, such as those of a batch norm, are multiplied into the weights
    when these are needed, since the products take as much memory as the model.

    Args:
        name: name of the weight in the model.
        weight: (out, in / groups, height, width); (out, in) for a linear layer.
        bias: (out,).
        stride: of rows and columns.
        padding: of rows and columns.
        dilation: of rows and columns.
        groups: groups of channels, as in `torch.nn.Conv2d`.
        low: lower bound of the result; 0 for ReLU.
        high: upper bound of the result.
        activation: one of `kernels.ACTIVATIONS`; None for none.
        packs: whether a dense convolution uses weights in oneDNN's own order if it can. For some
            sizes this is slower, since its result is in channels-last order.
        padding_after: padding below and to the right; `padding` is above and to the left. None if
            both are equal. Negative padding drops pixels.
        factors: `weight` times these factors (out,), in float64 and in order, is the weight used.

    Example:
        >>> relu = Layer("weight", torch.tensor([[1.0], [-1.0]]), torch.zeros(2), low=0.0)
        >>> relu(torch.ones(1, 1))
        tensor([[1., 0.]])
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
    activation: str | None = None
    packs: bool = True
    padding_after: tuple[int, int] | None = None
    factors: tuple[Tensor, ...] = ()
    _packed: Tensor | bool | None = field(default=None, init=False, repr=False)
    taps: Any = field(default=None, init=False, repr=False)  # `Taps.from_layer` keeps them
    is_released: bool = field(default=False, init=False, repr=False)
    combine: ClassVar[str] = "fma"  # see kernels.Variant
    padding_value: ClassVar[float] = 0.0
    pools: ClassVar[bool] = False  # whether it has no weights to prune, such as pooling
    adds: ClassVar[bool] = True  # whether it can add a residual
    __name__: ClassVar[str] = "layer"  # torch.fx names functions by it

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the layer densely.

        Args:
            x: (batch, in, height, width); (..., in) for a linear layer.
            residual: a tensor of the shape of the result.
        """
        y = self._combined(x)
        if residual is not None:
            y += residual
        if self.low == 0.0 and self.high == math.inf:
            y = y.relu_()
        elif self.low > -math.inf or self.high < math.inf:
            y = y.clamp_(self.low, self.high)
        return y if self.activation is None else IN_PLACE[self.activation](y)

    def release(self) -> None:
        """Free the weights. Only their shape and the nonzero ones, in `taps`, remain."""
        self.weight, self.factors = torch.zeros(()).expand(self.weight.shape), ()
        self.is_released = True
        self.free_packed()

    def free_packed(self) -> None:
        """Free the packed copy of the weights. The next dense call creates it again."""
        self._packed = None

    def _combined(self, x: Tensor) -> Tensor:
        if self.linear:
            self.fold()
            return F.linear(x, self.weight, self.bias)
        if self._is_product(x):
            self.fold()
            y = F.linear(x.flatten(1), self.weight.flatten(1), self.bias)
            return y.view(*y.shape, 1, 1)
        padding = self.padding
        if self.padding_after is not None or min(padding) < 0:  # PyTorch pads both sides alike
            (top, left), (bottom, right) = padding, self.padding_after or padding
            padding = (0, 0)
            x = F.pad(x, (left, right, top, bottom))
        if self._packed is None and self.packs:
            self._packed = pack(self, x.shape, padding)
        if self.packs and isinstance(self._packed, Tensor):
            return torch.ops.mkldnn._convolution_pointwise(
                x, self._packed, self.bias, padding, self.stride, self.dilation, self.groups,
                "none", [], "",
            )  # fmt: skip
        self.fold()
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _is_product(self, x: Tensor) -> bool:
        """Whether the kernel has the size of the input: the first linear layer of VGG, for example.

        A convolution would reorder these weights, which takes longer, and memory of their size.
        """
        size = self.weight.shape[2:]
        return (
            math.prod(size) > 1
            and x.shape[2:] == size
            and (self.groups, self.dilation, self.padding) == (1, (1, 1), (0, 0))
            and self.padding_after is None
        )

    @property
    def linear(self) -> bool:
        """Whether channels are the last dimension; otherwise they are the second."""
        return self.weight.dim() == 2

    @property
    def channelwise(self) -> bool:
        """Whether each output channel reads one input channel, as in depthwise convolutions.

        Kernels then compute channel by channel, so that memory is read sequentially.
        """
        return not self.linear and self.weight.shape[1] == 1

    @property
    def channels(self) -> tuple[int, int]:
        """Number of channels of the input and of the result."""
        return self.weight.shape[1] * self.groups, self.weight.shape[0]

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is zero."""
        known = self.taps if self.kernel_form is self else None
        kept = torch.count_nonzero(self.folded_weight()) if known is None else len(known.values)
        return 1.0 - int(kept) / max(1, self.weight.numel())

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that tell what it computes, besides its weight and bias, by name."""
        others = "name", "weight", "bias", "packs", "factors"
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.init if f.name not in others
        }

    @property
    def kernel_form(self) -> Layer:
        """The layer whose nonzero weights the kernels read: this one, or one like it."""
        return self

    def with_padding(self, before: tuple[int, int], after: tuple[int, int]) -> Layer:
        """Return a layer with another padding.

        Args:
            before: rows above and columns to the left.
            after: rows below and columns to the right.
        """
        return replace(self, padding=before, padding_after=None if before == after else after)

    def scaled(self, factor: Tensor, shift: Tensor | None = None) -> Layer:
        """Return a layer whose result is multiplied by `factor`, then shifted by `shift`.

        Args:
            factor: (out,).
            shift: (out,); None for no shift.
        """
        bias, factor = self.bias.double(), factor.double()
        bias = bias * factor + (0.0 if shift is None else shift.double())
        return replace(self, bias=bias.to(self.bias.dtype), factors=(*self.factors, factor))

    def folded_weight(self) -> Tensor:
        """Return the weights, multiplied by the factors of the output channels.

        Products are computed in float64 and rounded once.
        """
        weight = self.taps.weight(self) if self.is_released else self.weight
        for factor in self.factors:
            weight = _scaled(weight, factor)
        return weight

    def fold(self) -> None:
        """Multiply the factors into `weight`."""
        if self.factors or self.is_released:
            self.weight, self.factors = self.folded_weight(), ()
            self.is_released = False

    @contextmanager
    def temporarily_folded(self) -> Iterator[None]:
        """Free the folded and the packed weights of dense calls at the end of the block."""
        source = self.weight, self.factors
        try:
            yield
        finally:
            self.weight, self.factors = source
            self.free_packed()


def _scaled(weight: Tensor, factor: Tensor) -> Tensor:
    if not weight.is_contiguous() or not factor.isfinite().all():
        return (weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    flat, scaled = weight.view(-1), torch.zeros_like(weight)  # zeros stay zeros
    kept = flat.nonzero().view(-1)
    products = flat[kept].double() * factor[kept // max(1, weight[0].numel())]
    scaled.view(-1)[kept] = products.to(weight.dtype)
    return scaled


class MaxPool(Layer):
    """Max pooling as a layer. Only the shape of its weight has a meaning: the window size.

    Example:
        >>> pool = MaxPool.create("pool", 1, (2, 2), (2, 2), (0, 0), (1, 1))
        >>> pool(torch.arange(4.0).view(1, 1, 2, 2))
        tensor([[[[3.]]]])
    """

    combine = "max"
    padding_value = -math.inf
    pools = True
    adds = False
    __name__ = "max_pool"

    @classmethod
    def create(
        cls,
        name: str,
        channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> MaxPool:
        """Return a pooling layer for a number of channels; see `torch.nn.MaxPool2d`."""
        weight = torch.ones(channels, 1, *kernel, dtype=torch.float32, device="cpu")
        lowest = weight.new_full((channels,), -math.inf)
        return cls(name, weight, lowest, stride, padding, dilation, channels)

    def _combined(self, x: Tensor) -> Tensor:
        size, padding = self.weight.shape[2:], self.padding
        if self.padding_after is not None:
            (top, left), (bottom, right) = padding, self.padding_after
            x, padding = F.pad(x, (left, right, top, bottom), value=-math.inf), (0, 0)
        return F.max_pool2d(x, size, self.stride, padding, self.dilation)


class AvgPool(Layer):
    """Average pooling as a layer: a depthwise convolution whose weights are equal.

    Example:
        >>> pool = AvgPool.create("pool", 1, (2, 2), (2, 2), (0, 0))
        >>> pool(torch.arange(4.0).view(1, 1, 2, 2))
        tensor([[[[1.5000]]]])
    """

    pools = True
    __name__ = "avg_pool"

    @classmethod
    def create(
        cls,
        name: str,
        channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> AvgPool:
        """Return a pooling layer for a number of channels; see `torch.nn.AvgPool2d`."""
        weight = torch.ones(channels, 1, *kernel, dtype=torch.float32, device="cpu")
        weight /= math.prod(kernel)
        return cls(name, weight, weight.new_zeros(channels), stride, padding, groups=channels)

    def _combined(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.weight.shape[2:], self.stride, self.padding)


# Activation functions that write into their argument.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": partial(F.silu, inplace=True),
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_.default, approximate="tanh"),
    "hardswish": partial(F.hardswish, inplace=True),
    "sigmoid": Tensor.sigmoid_,
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
    "tanh": Tensor.tanh_,
}


def pack(layer: Layer, shape: Sequence[int], padding: tuple[int, int] = (0, 0)) -> Tensor | bool:
    """Return the weights in oneDNN's own order, so that it does not reorder them at every call.

    PyTorch has this operator for its compiler and may remove it. The packed weights are valid for
    all sizes, but oneDNN reorders them at every call for sizes for which it prefers another order.

    Args:
        layer: a convolution.
        shape: of its input.
        padding: of both sides of its input, in rows and columns.

    Returns:
        The packed weights, or False if they cannot be packed.

    Example:
        >>> layer = Layer("weight", torch.ones(2, 3, 1, 1), torch.zeros(2))
        >>> packed = pack(layer, (1, 3, 8, 8))
        >>> packed is False or packed.is_mkldnn
        True
    """
    if not torch.backends.mkldnn.is_available():
        return False
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.weight.shape[2:], strict=True)]
    if any(not 0 <= p <= r for p, r in zip(padding, reach, strict=True)):
        return False  # oneDNN may crash if a window contains padding only
    try:
        return torch.ops.mkldnn._reorder_convolution_weight(
            *(layer.folded_weight(), padding, layer.stride, layer.dilation, layer.groups),
            list(shape),
        )
    except (AttributeError, RuntimeError, TypeError):
        return False

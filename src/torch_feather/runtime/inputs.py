"""The inputs of a network: one tensor, several, or several by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_memory
from .errors import InputError

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class Inputs(NamedTuple):
    """What a network takes.

    Attributes:
        names: names of the arguments, if they are given by name.
        shapes: shape of one sample of each input.
        dtypes: type of each input.
        is_single: whether the network takes one tensor that is not named.

    Example:
        >>> Inputs.of({"ids": torch.ones(2, 7, dtype=torch.int64)}).shapes
        ((7,),)
    """

    names: tuple[str, ...] | None
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    is_single: bool

    @classmethod
    def of(cls, example: Example) -> Inputs:
        """Return a description of the inputs that are like an example.

        Raises:
            InputError: the example consists of other values than tensors, is empty, or holds
                different numbers of samples.
        """
        tensors = tensors_of(example)
        if not tensors:
            raise InputError("The example must have at least one tensor.")
        for x in tensors:
            if not isinstance(x, Tensor) or x.dim() == 0 or x.numel() == 0:
                raise InputError(
                    "The example must be a non-empty batch (batch, ...) of float32, or a tuple or "
                    f"dictionary of such batches and of integers, got {type(x).__name__}."
                )
            if x.is_complex() or (x.is_floating_point() and x.dtype != torch.float32):
                raise InputError(
                    "The example must be a non-empty batch (batch, ...) of float32, or of integers,"
                    f" got {x.dtype}."
                )
        if len({len(x) for x in tensors}) > 1:
            raise InputError(
                "The first dimension of all inputs must be the batch, got "
                f"{', '.join(str(tuple(x.shape)) for x in tensors)}."
            )
        names = tuple(example) if isinstance(example, Mapping) else None
        return cls(
            names,
            tuple(tuple(x.shape[1:]) for x in tensors),
            tuple(x.dtype for x in tensors),
            isinstance(example, Tensor),
        )

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the tensors of a call, in the order of the example.

        Raises:
            InputError: the call has other arguments than the example.
        """
        if self.names is None:
            if kwargs or len(args) != len(self.shapes):
                given = [str(len(args)), *kwargs]
                raise InputError(
                    f"The network was compiled for {len(self.shapes)} positional inputs, got "
                    f"{', '.join(given)}."
                )
            return list(args)
        if args or set(kwargs) != set(self.names):
            given = [*("a positional input" for _ in args), *kwargs]
            raise InputError(
                f"The network was compiled for the inputs {', '.join(self.names)}, by name, got "
                f"{', '.join(given)}."
            )
        return [kwargs[name] for name in self.names]

    def have_sizes_of(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the samples of tensors have the sizes of the example's."""
        return self.shapes == tuple(tuple(x.shape[1:]) for x in tensors)

    def check(self, tensors: Sequence[Any], any_size: bool) -> None:
        """Check the tensors of a call.

        Args:
            tensors: in the order of the example.
            any_size: whether samples may have other sizes than those of the example.

        Raises:
            InputError: one has another shape or type, or no memory that machine code can read; or
                the numbers of samples differ.
        """
        for x, shape, dtype in zip(tensors, self.shapes, self.dtypes, strict=True):
            check_memory(x, shape, dtype, any_size)
        if len({len(x) for x in tensors}) > 1:
            raise InputError(
                "All inputs must have the same number of samples, got "
                f"{', '.join(str(len(x)) for x in tensors)}."
            )


def tensors_of(example: Example) -> list[Any]:
    """Return the tensors of an example, in order.

    Example:
        >>> len(tensors_of((torch.ones(1), torch.ones(1))))
        2
    """
    if isinstance(example, Tensor):
        return [example]
    if isinstance(example, Mapping):
        return list(example.values())
    return list(example) if isinstance(example, Sequence) else [example]


def like(example: Example, tensors: Sequence[Any]) -> Example:
    """Return tensors in the form of an example.

    Example:
        >>> like({"a": torch.ones(1)}, [torch.zeros(1)])
        {'a': tensor([0.])}
    """
    if isinstance(example, Tensor):
        (only,) = tensors
        return only
    if isinstance(example, Mapping):
        return dict(zip(example, tensors, strict=True))
    return tuple(tensors)


def arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and named arguments with which a model is called.

    Example:
        >>> arguments((1, 2))
        ((1, 2), {})
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}

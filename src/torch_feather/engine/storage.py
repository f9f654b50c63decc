"""Which memory of parameters is supported: the engine exchanges their values in place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..weights.shards import is_sharded, local, local_all


def check_storage(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Check that the engine can exchange the values of parameters in place.

    Args:
        names: names of the parameters, for messages.
        parameters: the parameters.

    Raises:
        ConfigurationError: a parameter is not a dense floating-point tensor on a CPU or CUDA
            device, or they are on several devices, or in the same memory.

    Example:
        >>> check_storage(["weight"], [torch.ones(2, 3)])
        >>> try:
        ...     check_storage(["scale"], [torch.ones(())])
        ... except ConfigurationError as error:
        ...     print(error)
        scale is a single number and cannot be pruned. Exclude it: exclude='scale'.
    """
    for name, parameter in zip(names, parameters, strict=True):
        _check_one(name, parameter)
    _check_disjoint(names, parameters)
    devices = sorted({str(local(parameter).device) for parameter in parameters})
    if len(devices) > 1:
        raise ConfigurationError(
            f"The prunable weights are on several devices ({', '.join(devices)}). A common "
            "threshold needs them on one."
        )


def _check_disjoint(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Raise ConfigurationError if two parameters share memory, which fill what they have."""
    ranges = []
    for name, parameter in zip(names, parameters, strict=True):
        held = local(parameter)
        if held.numel() and (first := held.data_ptr()):
            ranges.append((str(held.device), first, first + held.numel() * held.itemsize, name))
    ranges.sort()
    for (device, _, end, name), (other_device, first, _, other) in pairwise(ranges):
        if device == other_device and first < end:
            raise ConfigurationError(
                f"{name} and {other} are different parameters in the same memory, so each would "
                "change the other. Tie them as one parameter (a.weight = b.weight), or give each "
                "its own memory (weight.data = weight.data.clone()). Or exclude one of them: "
                f"exclude={other!r}."
            )


def _check_one(name: str, parameter: Tensor) -> None:
    """Raise ConfigurationError if a parameter is not supported."""
    fix = f"Exclude it: exclude={name!r}."
    if not parameter.is_floating_point() or parameter.itemsize == 1:
        raise ConfigurationError(
            f"{name} is {parameter.dtype}. Only floating-point weights of 16 bits or more can be "
            f"pruned. {fix}"
        )
    if parameter.dim() == 0:
        raise ConfigurationError(f"{name} is a single number and cannot be pruned. {fix}")
    if is_sharded(parameter):
        if any(p.is_partial() for p in parameter.placements):  # type: ignore[attr-defined]
            raise ConfigurationError(
                f"{name} is a sum over processes (a Partial placement), so no process holds its "
                f"values. Redistribute it. {fix}"
            )
        whole, parameter = parameter, local(parameter)
        if not parameter.is_contiguous():
            raise ConfigurationError(
                f"The shard of {name} is not contiguous in memory. Shard it by fully_shard, "
                f"parallelize_module or distribute_tensor. {fix}"
            )
        if parameter.numel() == 0 < whole.numel():
            return
    if parameter.layout != torch.strided or parameter.device.type not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"{name} is on {parameter.device} with layout {parameter.layout}. Weights must be "
            "strided tensors on a CPU or a CUDA device."
        )
    if parameter.numel() == 0 or not _is_dense(parameter):
        raise ConfigurationError(
            f"{name} is empty or does not fill its memory (shape {tuple(parameter.shape)}, "
            f"strides {parameter.stride()}). Make it contiguous. {fix}"
        )


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one block of memory without gaps or overlap."""
    expected = 1
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def layouts(parameters: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Return shape, type, device, and shape and strides of the local shard, of each parameter.

    Args:
        parameters: plain or sharded.

    Example:
        >>> [(shape, own, strides) for shape, _, _, own, strides in layouts([torch.ones(2, 3)])]
        [(torch.Size([2, 3]), torch.Size([2, 3]), (3, 1))]
    """
    pairs = zip(parameters, local_all(parameters), strict=True)
    return [(p.shape, held.dtype, held.device, held.shape, held.stride()) for p, held in pairs]

"""bfloat16 autocast, except for layers that it slows down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def autocast(device: torch.device, enabled: bool) -> Iterator[None]:
    """Use bfloat16 autocast if `enabled`; on CPUs, keep depthwise convolutions in float32.

    On CPUs the bfloat16 backward pass of depthwise convolutions takes six times as long (PyTorch
    2.14.1 with oneDNN, layers of MobileNetV1 at 16x16 pixels). This exceeds the gain in the rest
    of the network.

    Args:
        device: the device of the network.
        enabled: whether to use autocast.

    Example:
        >>> with autocast(torch.device("cpu"), True):
        ...     torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype
        torch.bfloat16
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        if enabled and device.type == "cpu":
            with _DepthwiseInFloat32():
                yield
        else:
            yield


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 numbers faster than float32 numbers.

    CPUs without such instructions convert to float32 and back, which takes longer.

    Args:
        device: the device.

    Example:
        >>> has_bfloat16(torch.device("cpu")) in (True, False)
        True
    """
    if device.type != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Early versions of PyTorch do not know the capabilities.
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(key, False) for key in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))


class _DepthwiseInFloat32(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.conv2d or not _is_depthwise(*args):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            wide: list[Any] = [a.float() if isinstance(a, Tensor) else a for a in args]
            return func(*wide, **kwargs)


def _is_depthwise(x: Tensor, weight: Tensor | None = None, *_: Any) -> bool:
    return weight is not None and x.shape[-3] > 1 and weight.shape[1] == 1

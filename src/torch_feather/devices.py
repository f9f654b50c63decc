"""Whether the host may read a value, so that code can take the shorter of two paths."""

from __future__ import annotations

import numpy as np
import torch


def synchronizes(device: torch.device) -> bool:
    """Return whether reading a value on `device` synchronizes the host with it.

    Such a read also cannot be captured in a CUDA graph. Call it through the module
    (`devices.synchronizes(...)`), so that tests can take an accelerator's path on a CPU.

    Example:
        >>> synchronizes(torch.device("cpu"))
        False
    """
    return device.type != "cpu"


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is captured, when nothing can be read on the host.

    Example:
        >>> is_capturing(torch.device("cpu"))
        False
    """
    return synchronizes(device) and torch.cuda.is_current_stream_capturing()


def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return uninitialized flat memory; on a CPU, large memory is in huge pages where there are.

    NumPy asks Linux for huge pages, and PyTorch does not. Without them, the first use of new memory
    takes several times as long.

    Example:
        >>> empty(3, torch.float32, torch.device("cpu")).shape
        torch.Size([3])
    """
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size * dtype.itemsize, np.uint8)).view(dtype)

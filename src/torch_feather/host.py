"""When the host may read a value, so that code can take the shorter of two ways."""

from __future__ import annotations

import torch


def waits_for(device: torch.device) -> bool:
    """Whether reading a value on `device` makes the host wait, and cannot be captured in a graph.

    Called through the module (`host.waits_for`), so that tests can take the way of an accelerator
    where there is none.
    """
    return device.type != "cpu"

"""Shapes of LSTM and GRU without a computation of their steps in time.

Without values, as in `torch.export`, PyTorch computes the results of an LSTM or GRU step by step,
which takes seconds for a long sequence. Their shapes are known in advance.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph

aten = torch.ops.aten
NAME = "_rnn_helper"  # a private function of PyTorch; if it is removed, nothing is replaced

_lock = threading.Lock()
_users = 0
_active = threading.local()


@contextmanager
def known_shapes() -> Iterator[list[int]]:
    """Return the shapes of LSTM and GRU at once, for tensors without values, in this thread.

    Yields:
        A list to which the number of units is appended for each of these layers that PyTorch
        computes in Python, as in `torch.export`.

    Example:
        >>> from torch._subclasses.fake_tensor import FakeTensorMode
        >>> mode = FakeTensorMode(allow_non_fake_inputs=True)
        >>> with known_shapes(), mode, torch.no_grad():
        ...     y, _ = torch.nn.LSTM(3, 5)(torch.ones(7, 2, 3))
        >>> y.shape
        torch.Size([7, 2, 5])
    """
    global _original, _users
    before, _active.calls = getattr(_active, "calls", None), []
    with _lock:
        if _users == 0 and hasattr(decompositions, NAME):
            _original = getattr(decompositions, NAME)
            setattr(decompositions, NAME, _shapes)
        _users += 1
    try:
        yield _active.calls
    finally:
        _active.calls = before
        with _lock:
            _users -= 1
            if _users == 0 and hasattr(decompositions, NAME):
                setattr(decompositions, NAME, _original)


def has_recurrent(graph: Graph) -> bool:
    """Return whether a graph calls LSTM or GRU as one function.

    Example:
        >>> has_recurrent(Graph())
        False
    """
    return any(node.target in (aten.lstm.input, aten.gru.input) for node in graph.nodes)


_original: Any = None


def _shapes(x: Tensor, hidden: Any, *args: Any) -> Any:
    """Replace PyTorch's function: (input, hidden, params, ..., batch_first, layer function)."""
    calls = getattr(_active, "calls", None)
    if calls is None or len(args) != 8 or x.dim() != 3 or not isinstance(x, FakeTensor):
        return _original(x, hidden, *args)
    is_bidirectional, batch_first = args[5], args[6]
    state = hidden[0] if isinstance(hidden[0], Tensor) else hidden[0][0]
    calls.append(int(state.shape[-1]))
    features = state.shape[-1] * (2 if is_bidirectional else 1)
    first, second = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    out = x.new_empty((first, second, features))
    return (out.transpose(0, 1) if batch_first else out), list(hidden)

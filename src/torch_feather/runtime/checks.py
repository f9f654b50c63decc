"""Checks of models and inputs: what a compiled network supports."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_map

from ..errors import StateError
from ..prunable import unwrap
from .errors import CaptureError, InputError
from .ownership import shared_parameters

NOT_SAVED = (
    "A compiled network cannot be pickled, copied or exported, and has no state dict. Save it with "
    "feather.save_compiled, or save the model (feather.save_sparse) and the tuning results "
    "(save_tuning), then compile again. To export it, export the model."
)
NOT_LOADED = (
    "A compiled network has no state to load. Load the weights into the model (load_state_dict, "
    "feather.load_sparse), then compile it again."
)
NOT_TRACED = (
    "A compiled network cannot be traced, exported or compiled by PyTorch (torch.jit.trace, "
    "torch.onnx.export, torch.export, torch.compile, torch.fx): its kernels compute outside of "
    "PyTorch, so the result would contain the answer for one input. Trace, export or compile the "
    "model instead, and call the compiled network directly."
)

# Held while torch.export captures a model: its flags, which `check_eager` reads, are those of the
# whole process.
CAPTURING = threading.RLock()


def check_count(name: str, number: Any) -> int:
    """Return a number that the user gave, if it is an integer of at least 1.

    Args:
        name: what the number is called in the error message.
        number: the number.

    Raises:
        InputError: it is something else.

    Example:
        >>> check_count("threads", 2)
        2
    """
    if not isinstance(number, int) or number < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {number!r}.")
    return number


def check_eager(x: Any) -> None:
    """Check that PyTorch computes operations now, instead of recording them.

    Args:
        x: the input of a compiled network.

    Raises:
        StateError: the call is traced, exported or compiled, or `x` has no values.

    Example:
        >>> check_eager(torch.ones(2, 3))
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
        with CAPTURING:  # wait for another thread that captures a model
            pass
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or get_proxy_mode() is not None
        or isinstance(x, FakeTensor)
        or isinstance(
            torch.empty(0, device="cpu"), FakeTensor
        )  # a mode in which no tensor has values
    ):
        _raise_not_traced()


@torch.compiler.disable(reason=NOT_TRACED)
def _raise_not_traced() -> None:
    """Raise an error. torch.compile calls this function instead of compiling another path."""
    raise StateError(NOT_TRACED)


def check_memory(
    x: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, any_size: bool = False
) -> None:
    """Check an input of a compiled network.

    Args:
        x: the input.
        shape: shape of one sample of the example.
        dtype: expected type.
        any_size: whether a sample may have another shape with as many dimensions.

    Raises:
        InputError: it is no dense tensor of this shape and type on the CPU, or has no memory that
            machine code can read.

    Example:
        >>> check_memory(torch.ones(2, 3), shape=(3,))
    """
    if (
        not isinstance(x, Tensor)
        or (x.dim(), x.dtype, x.layout) != (1 + len(shape), dtype, torch.strided)
        or x.device.type != "cpu"
        or (tuple(x.shape[1:]) != shape and (not any_size or 0 in x.shape))
    ):
        expected = ", ".join(map(str, ("batch", *shape)))
        given = type(x).__name__
        if isinstance(x, Tensor):
            given = f"{x.dtype} {tuple(x.shape)}, {x.layout}, on {x.device}"
        kind = str(dtype).removeprefix("torch.")
        advice = "" if any_size else " Compile another network for inputs of other sizes."
        raise InputError(
            f"The network was compiled for {kind} inputs ({expected}) on the CPU, got {given}."
            f"{advice}"
        )
    try:
        x.data_ptr()
    except RuntimeError as error:
        raise InputError(
            "A compiled network cannot be called within torch.func transforms (vmap, grad, jvp): "
            "it reads the memory of its input. Call it outside of them."
        ) from error


def check_contiguous(x: Tensor) -> None:
    """Check an input of a graph that reads its memory, such as by `as_strided`.

    Raises:
        InputError: it is not contiguous, or a part of another tensor.

    Example:
        >>> check_contiguous(torch.ones(2, 3))
    """
    if x.storage_offset() or not x.is_contiguous():
        raise InputError(
            "This model calls as_strided, so its input must be contiguous and no part of another "
            f"tensor, got strides {x.stride()}, offset {x.storage_offset()}. Pass x.clone("
            "memory_format=torch.contiguous_format)."
        )


def copy_in_eval_mode(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode, of wrappers of torch.compile the model inside.

    Its parameters share the memory of the model's if possible, see `ownership`.

    Raises:
        CaptureError: the model cannot be copied.
        StateError: a part of it is a compiled network.

    Example:
        >>> copy_in_eval_mode(nn.Linear(4, 2)).training
        False
    """
    try:
        model = unwrap(model)
        return copy.deepcopy(model, shared_parameters(model)).eval()
    except StateError:  # a compiled network
        raise
    except RuntimeError as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}). Make masks of "
            "torch.nn.utils.prune permanent first: prune.remove(module, name)."
        ) from error


def check_types(model: nn.Module, *examples: Tensor) -> None:
    """Check that a model is float32, and on the CPU as well as the examples.

    Raises:
        InputError: it is not.

    Example:
        >>> check_types(nn.Linear(4, 2), torch.ones(1, 4))
    """
    for tensor in (*model.parameters(), *model.buffers(), *examples):
        if tensor.device.type != "cpu":
            raise InputError(
                f"compile_sparse requires the model and the example on the CPU, got a tensor on "
                f"{tensor.device}. Move both to the CPU first."
            )
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32 and weight.is_floating_point():
            raise InputError(
                f"compile_sparse requires float32, got {name} of {weight.dtype}. Pass "
                "copy.deepcopy(model).float()."
            )


def result_of_empty_batch(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Callable[[], Any]:
    """Return a function that returns the model's output for a batch of 0.

    The graph cannot compute it: torch.export assumes that a batch is not empty, and does not report
    which branches of the model it removed for that reason.

    Args:
        model: the model.
        args: its inputs.
        kwargs: its inputs by name.

    Returns:
        A function that raises InputError if the model fails on a batch of 0.

    Example:
        >>> result_of_empty_batch(nn.Linear(4, 2), torch.ones(1, 4))().shape
        torch.Size([0, 2])
    """
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling for one call would be slow
            named = {name: x[:0] for name, x in kwargs.items()}
            found = model(*(x[:0] for x in args), **named)
    except Exception as error:  # any error of the model
        message = (
            f"{type(model).__name__} fails on a batch of 0 ({error}), and so does the compiled "
            "network. Pass at least one sample."
        )

        def fail() -> Any:
            raise InputError(message)

        return fail
    return lambda: tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, found)


def fail_for_empty_batch() -> Any:
    """Raise an error for an empty batch of a loaded network.

    Raises:
        InputError: always.

    Example:
        >>> fail_for_empty_batch()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torch_feather.runtime.errors.InputError: ...
    """
    raise InputError(
        "A network that was loaded from a file accepts only the batch sizes for which it was saved,"
        " got a batch of 0."
    )

"""Runs sparse networks that torch-feather exported as native libraries. Needs NumPy alone."""

from __future__ import annotations

import ctypes
import threading
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Model", "Tensor", "load"]

ERRORS = {1: "a pointer is null, or a number is out of range", 2: "out of memory", 3: "busy"}
MAX_CONCURRENT = 4096


class Tensor(NamedTuple):
    """Description of an input or output.

    Attributes:
        name: its name.
        shape: its sizes; the first one is the batch size.
    """

    name: str
    shape: tuple[int, ...]


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("size", ctypes.c_int64),
    )


class Model:
    """A network in a native library.

    Args:
        path: the shared library.
        name: the name of the network. [default: from the name of the file, `libNAME.so`]
        concurrent: number of threads that may compute at the same time; further calls wait.

    Attributes:
        inputs: the input tensors.
        outputs: the output tensors.

    Raises:
        OSError: the library cannot be loaded.
        ValueError: it has no network of this name, or `concurrent` is out of range.
        MemoryError: there is not enough memory.
    """

    def __init__(
        self, path: str | PathLike[str], name: str | None = None, *, concurrent: int = 1
    ) -> None:
        self._model: ctypes.c_void_p | None = None
        if not 1 <= concurrent <= MAX_CONCURRENT:
            raise ValueError(f"concurrent must be from 1 to {MAX_CONCURRENT}, got {concurrent}.")
        file = Path(path).resolve()
        name = name or file.stem.removeprefix("lib")
        library = ctypes.CDLL(str(file))
        try:
            create, self._run, self._destroy = (
                library[f"{name}_{function}"] for function in ("create", "run", "destroy")
            )
            describe = library[f"{name}_input"], library[f"{name}_output"]
        except AttributeError as error:
            raise ValueError(f"{file} has no network {name!r} ({error}). Pass its name.") from None
        self._run.argtypes = [ctypes.c_void_p] * 3
        self._destroy.argtypes, self._destroy.restype = [ctypes.c_void_p], None
        self.inputs, self.outputs = map(_descriptions, describe)
        self._free = threading.BoundedSemaphore(concurrent)
        model = ctypes.c_void_p()
        _check(create(ctypes.byref(model), ctypes.c_int32(concurrent)))
        self._model = model

    def __call__(self, *inputs: Any) -> Any:
        """Compute the outputs.

        Args:
            inputs: arrays of the shapes of `inputs`; they are converted to float32.

        Returns:
            An array, or a tuple if the network has several outputs.

        Raises:
            ValueError: an input has another shape.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"The network has {len(self.inputs)} input(s), got {len(inputs)}.")
        arrays = [np.ascontiguousarray(x, np.float32) for x in inputs]
        for array, expected in zip(arrays, self.inputs, strict=True):
            if array.shape != expected.shape:
                raise ValueError(f"{expected.name}: expected {expected.shape}, got {array.shape}.")
        results = tuple(np.empty(tensor.shape, np.float32) for tensor in self.outputs)
        with self._free:
            if self._model is None:
                raise ValueError("The model is closed.")
            _check(self._run(self._model, _addresses(arrays), _addresses(results)))
        return results[0] if len(results) == 1 else results

    def close(self) -> None:
        """Free the memory of the network. No call may be in progress."""
        if self._model is not None:
            self._destroy(self._model)
            self._model = None

    def __del__(self) -> None:
        self.close()


def load(path: str | PathLike[str], name: str | None = None, *, concurrent: int = 1) -> Model:
    """Return the network in a native library; see `Model`."""
    return Model(path, name, concurrent=concurrent)


def _descriptions(describe: Any) -> list[Tensor]:
    describe.restype = ctypes.POINTER(_Tensor)
    found: list[Tensor] = []
    while tensor := describe(ctypes.c_int32(len(found))):
        content = tensor.contents
        shape = tuple(content.shape[i] for i in range(content.rank))
        found.append(Tensor(content.name.decode(), shape))
    return found


def _addresses(arrays: Any) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def _check(status: int) -> None:
    if status:
        error = MemoryError if status == 2 else RuntimeError
        raise error(f"error {status} of the native library: {ERRORS.get(status, 'unknown')}")

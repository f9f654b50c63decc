"""Files of compiled networks: `save_compiled` and `load_compiled`.

A file is in the safetensors format. Its metadata hold the plan as JSON, its arrays the nonzero
weights (`stored_weights`) and the machine code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import treespec_dumps, treespec_loads

from ..errors import FileFormatError, StateError, install_hint
from ..files import replace_file, to_path
from .capture import Captured
from .checks import check_count
from .encoding import Decoder, Encoder
from .errors import InputError
from .inputs import Inputs
from .kernels import (
    Tile,
    add_objects,
    compile_object,
    emit_convolutions,
    fingerprint,
    host,
    library,
)
from .module import SparseModule
from .other_sizes import Planned
from .plan import Recurrence, Sparse
from .stored_weights import check_dtype
from .tuning import LayerTuning

KEY, FORMAT = "torch-feather-compiled", 5
CODE = ("code.base", "code.kernels")


# long: half of it is documentation
def save_compiled(
    network: SparseModule,
    path: str | Path,
    batch_sizes: Iterable[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a compiled network, which `load_compiled` loads without capturing or timing it again.

    The file holds machine code for this kind of processor, and is for this version of
    torch-feather. Keep the model (`save_sparse`) to compile it again elsewhere.

    Args:
        network: what `compile_sparse` returned.
        path: the file, which is replaced atomically.
        batch_sizes: batch sizes that the loaded network accepts.
            [default: that of the example with which the network was compiled]
        dtype: store the weights of convolutions, linear and recurrent layers, with batch norms
            folded in, as torch.float16, torch.bfloat16 or torch.int8, which makes the file smaller.
            **Weights are rounded**, so the loaded network returns other numbers than `network`. It
            computes in float32, at the same speed. int8 has one scale per output channel (of a gate
            in recurrent layers), and no zero point. Other tensors keep their type. [default: the
            exact weights]

    Raises:
        ConfigurationError: `dtype` is another type, or a weight is out of its range.
        StateError: the network contains functions that files cannot hold, such as branches of
            `torch.cond`.
        InputError: the network does not accept one of the batch sizes.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> import torch_feather as feather
        >>> network = feather.compile_sparse(torch.nn.Linear(64, 8), torch.zeros(1, 64), threads=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     feather.save_compiled(network, Path(folder, "linear.compiled"))
        ...     loaded = feather.load_compiled(Path(folder, "linear.compiled"))
        >>> torch.equal(loaded(torch.ones(1, 64)), network(torch.ones(1, 64)))
        True
    """
    safetensors = _safetensors()
    if not isinstance(network, SparseModule):
        raise StateError(
            f"save_compiled requires a network of compile_sparse, got {type(network).__name__}."
        )
    sizes = [network.batch_size] if batch_sizes is None else sorted(set(batch_sizes))
    planned = _planned(network, sizes)
    encoder = Encoder(check_dtype(dtype))
    header = {
        "format": FORMAT,
        "processor": [host().triple, host().cpu, host().features],
        "fingerprint": fingerprint(),
        "torch": torch.__version__,
        "threads": network.threads,
        "chunk_size": network.given_chunk_size,
        "plan_chunk_size": planned.chunk_size,
        "inputs": _inputs(network.inputs),
        "reads_memory": planned.captured.reads_memory,
        "spec": treespec_dumps(planned.captured.spec),
        "strides": {str(n): _strides(network, planned, n) for n in sizes},
        "tuning": {name: asdict(layer) for name, layer in network.tuning.items()},
        "plan": encoder.plan(planned.plan, planned.constants),
    }
    names, code = _kernels(network, planned, sizes)
    header["kernels"] = names
    arrays = dict(encoder.arrays)
    for name, data in zip(CODE, (library().base, code), strict=True):
        arrays[name] = np.frombuffer(data, np.uint8)
    header["sha256"] = checksum(header, arrays)
    data = safetensors.save(arrays, {KEY: json.dumps(header)})
    replace_file(to_path(path), lambda file: file.write(data))


def load_compiled(path: str | Path, threads: int | None = None) -> SparseModule:
    """Load a compiled network that `save_compiled` wrote.

    The file contains machine code, which is executed: load files only from sources that you trust.

    Inputs that are not contiguous are accepted; results have the strides of those for contiguous
    inputs.

    Args:
        path: the file.
        threads: number of threads of the sparse layers. [default: that of the saved network]

    Returns:
        The network; it accepts the batch sizes for which it was saved.

    Raises:
        FileFormatError: the file is damaged, holds something else, was written by another version,
            or is for another kind of processor.
        InputError: `threads` is not an integer of at least 1.
        OSError: the file cannot be read.
        ImportError: safetensors or llvmlite is not installed.

    Example:
        >>> load_compiled("missing.compiled")
        Traceback (most recent call last):
        FileNotFoundError: missing.compiled does not exist.
    """
    if threads is not None:
        check_count("threads", threads)
    path = to_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    header, arrays = _read(path)
    _check_processor(path, header)
    try:
        return _network(header, arrays, threads)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise FileFormatError(
            f"{path} was written with PyTorch {header.get('torch')}, and this is "
            f"{torch.__version__}; or it is damaged ({error!r:.200}). Compile the model again."
        ) from error


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            f"Files of compiled networks require safetensors. {install_hint('files')}"
        ) from None
    return safetensors.numpy


def _inputs(inputs: Inputs) -> dict[str, Any]:
    dtypes = [str(dtype).removeprefix("torch.") for dtype in inputs.dtypes]
    return {**inputs._asdict(), "dtypes": dtypes}


def _planned(network: SparseModule, sizes: Sequence[int]) -> Planned:
    """Return a graph and a plan that are valid for all batch sizes.

    Raises:
        InputError: there is none.
    """
    found = network.planned(*_examples(network, network.batch_size))
    for batch in sizes:
        if batch > 0 and not found.captured.accepts(*_examples(network, batch)):
            with suppress(InputError):
                found = network.planned(*_examples(network, batch))
    for batch in sizes:
        if batch < 1 or not found.captured.accepts(*_examples(network, batch)):
            raise InputError(
                f"The network does not accept a batch of {batch}, or not in the same file as the "
                "other sizes. Compile it with an example of this size."
            )
    return found


def _examples(network: SparseModule, batch: int) -> list[Tensor]:
    return [
        torch.zeros((batch, *shape), dtype=dtype)
        for shape, dtype in zip(network.inputs.shapes, network.inputs.dtypes, strict=True)
    ]


def _strides(network: SparseModule, planned: Planned, batch: int) -> list[Any]:
    """Return the strides of the outputs for a batch size."""
    found = planned.captured.shapes.output_strides(*_examples(network, batch))
    return [s and list(s) for s in found]


def _kernels(
    network: SparseModule, planned: Planned, sizes: Sequence[int]
) -> tuple[list[str], bytes]:
    """Return the names and the object file of the kernels that the network calls."""
    variants, recurrent = {}, dict[str, None]()
    for batch in sizes:
        plan = network.batch_plan(batch, planned)
        for step in plan.plan.steps:
            if isinstance(step, Sparse):
                variant = plan.variant(step, plan.tile(step))
                variants[variant.name] = variant
            elif isinstance(step, Recurrence):
                recurrent[plan.recurrence(step)] = None
    # As in `KernelLibrary`: code for this process, which is position-independent here.
    text = emit_convolutions(host(), variants.values(), recurrent)
    return [*variants, *recurrent], compile_object(host(), text)


def checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Return the hash of a file's header, without the entry of the hash itself, and arrays.

    Example:
        >>> checksum({"sha256": "a"}, {}) == checksum({}, {})
        True
    """
    rest = {name: value for name, value in header.items() if name != "sha256"}
    found = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header and the arrays of a file.

    Raises:
        FileFormatError: it is damaged or holds something else.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})[KEY])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known, expected = header["format"], header.get("sha256")
        if known == FORMAT:
            header["processor"], header["fingerprint"]  # KeyError if there are none
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is not a file of save_compiled, or is damaged ({error!r:.200})."
        ) from error
    if known != FORMAT:
        raise FileFormatError(
            f"{path} has format {known}, and this version reads {FORMAT}. Compile the model again."
        )
    if checksum(header, arrays) != expected:
        raise FileFormatError(f"{path} is damaged: its checksum differs. Save it again.")
    return header, arrays


def _check_processor(path: Path, header: Mapping[str, Any]) -> None:
    triple, cpu, features = header["processor"]
    has = set(host().features.split(","))
    missing = [f for f in features.split(",") if f.startswith("+") and f not in has]
    if triple != host().triple or missing:
        lacks = f", which lacks {', '.join(f[1:] for f in missing)}" if missing else ""
        raise FileFormatError(
            f"{path} holds machine code for {cpu} ({triple}), and this processor is {host().cpu} "
            f"({host().triple}){lacks}. Compile the model on this machine."
        )
    if header["fingerprint"] != fingerprint():
        raise FileFormatError(
            f"{path} was written by another version of torch-feather, by an installation without "
            f"source files, or on a processor with other features ({cpu}). Compile the model again."
        )


class _StoredShapes:
    """The strides of a network's outputs, by batch size."""

    def __init__(self, strides: Mapping[int, Sequence[Any]]) -> None:
        self._strides = strides

    def output_strides(self, *inputs: Tensor) -> tuple[Any, ...]:
        return tuple(self._strides.get(len(inputs[0]), ()))


def _network(
    header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], threads: int | None
) -> SparseModule:
    base, code = (arrays[name].tobytes() for name in CODE)
    add_objects(base, header["kernels"], code)
    decoder = Decoder(header["plan"], arrays)
    given, strides = header["inputs"], {int(n): s for n, s in header["strides"].items()}
    inputs = Inputs(
        None if given["names"] is None else tuple(given["names"]),
        tuple(map(tuple, given["shapes"])),
        tuple(getattr(torch, name) for name in given["dtypes"]),
        given["is_single"],
    )
    stored: Any = _StoredShapes(strides)
    captured = Captured(
        decoder.plan,  # type: ignore[arg-type]
        lambda *tensors: len(tensors[0]) in strides,
        treespec_loads(header["spec"]),
        stored,
        header["reads_memory"],
    )
    tuning = {
        name: LayerTuning(**{**layer, "tile": Tile(*layer["tile"])})
        for name, layer in header["tuning"].items()
    }
    return SparseModule.restored(
        inputs=inputs,
        captured=captured,
        constants=decoder.constants,
        plan=decoder.plan,
        tuning=tuning,
        threads=header["threads"] if threads is None else threads,
        given_chunk_size=header["chunk_size"],
        chosen=header["plan_chunk_size"],
        batch_size=min(strides),
    )

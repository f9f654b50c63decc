"""ONNX files, which store zeros like other weights or, for ONNX Runtime, leave them out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, FeatherError, install_hint
from ..files import replace_file, to_path
from ..prunable import unwrap

TOLERANCE = 1e-5  # relative to the largest output


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    sparse_initializers: bool = False,
) -> None:
    """Save a model in eval mode as ONNX, for batches of any size.

    Before the file is written, its outputs in onnxruntime are compared with PyTorch's.

    Args:
        model: takes one tensor and returns one tensor.
        example: an input (1, ...); only its shape and type matter, and the values of integers.
        path: the file, which is replaced atomically; on any error it is unchanged.
        metadata: texts to store in `metadata_props`, by name.
        sparse_initializers: whether to store weights of more than two thirds zeros as
            `sparse_initializer` of the ONNX standard: 12 bytes per nonzero value in float32. ONNX
            Runtime reads them, and makes them dense. OpenVINO does not read them.

    Raises:
        ConfigurationError: `model` is not a module, `example` is not a batch, or `path` is no path.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        FeatherError: the outputs differ by more than 1e-5 of the largest output.
        torch.onnx.OnnxExporterError: PyTorch cannot express the model in ONNX.
        OSError: the file cannot be written.

    Example:
        >>> export_onnx(nn.Linear(4, 2), torch.tensor(0.0), "model.onnx")
        Traceback (most recent call last):
        torch_feather.errors.ConfigurationError: The example must be a batch (1, ...), got a ...
    """
    path = to_path(path)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"export_onnx requires a module, got {type(model).__name__}.")
    if not isinstance(example, Tensor) or not example.dim():
        kind = "tensor without dimensions" if isinstance(example, Tensor) else type(example)
        raise ConfigurationError(f"The example must be a batch (1, ...), got a {kind}.")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX export requires {error.name}. {install_hint('onnx')}") from error
    model = copy.deepcopy(unwrap(model)).cpu().eval()
    inputs = _two_samples(example)
    batches = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        model, (inputs,), dynamo=True, dynamic_shapes=batches, verbose=False
    )
    assert program is not None
    proto = program.model_proto
    if sparse_initializers:
        _leave_zeros_out(proto.graph)
    _compare(model, proto.SerializeToString(), inputs, path)
    for key, text in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=text)
    replace_file(path, lambda file: file.write(proto.SerializeToString()))


def _two_samples(example: Tensor) -> Tensor:
    """Return two inputs like an example: torch.export specializes the graph for a batch of one."""
    if not example.is_floating_point():  # random integers may be no valid tokens
        return example[:1].cpu().repeat(2, *[1] * (example.dim() - 1))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *example.shape[1:], generator=generator).to(example.dtype)


def _leave_zeros_out(graph: Any) -> None:
    """Replace initializers that are smaller with the positions of their nonzero values."""
    from onnx import helper, numpy_helper

    dense = list(graph.initializer)
    del graph.initializer[:]
    for tensor in dense:
        values = numpy_helper.to_array(tensor)
        places = np.flatnonzero(values)
        if len(places) * (values.itemsize + 8) >= values.nbytes:
            graph.initializer.append(tensor)
            continue
        graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                numpy_helper.from_array(values.ravel()[places], tensor.name),
                numpy_helper.from_array(places.astype(np.int64), f"{tensor.name}_indices"),
                values.shape,
            )
        )


def _compare(model: nn.Module, data: bytes, inputs: Tensor, path: Path) -> None:
    """Raise a FeatherError if onnxruntime computes other outputs than PyTorch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for batch in (inputs, inputs[:1]):
        with torch.no_grad():
            expected = model(batch)
        found = torch.from_numpy(
            session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
        )
        difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        if not difference <= TOLERANCE:
            raise FeatherError(
                f"Outputs in onnxruntime differ from PyTorch's by {difference:.1e} of the largest. "
                f"{path} was not written."
            )

"""ONNX files, for runtimes that know nothing of sparsity: zeros are stored like other weights."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import FeatherError
from ..files import replace_file
from ..prunable import unwrap

TOLERANCE = 1e-5  # of the largest output


def export_onnx(model: nn.Module, example: Tensor, path: str | PathLike[str]) -> None:
    """Store `model` in evaluation mode as ONNX, for batches of any size; checked by running it.

    Args:
        model: takes one tensor, gives one.
        example: one input, (1, ...); only its shape and type matter.
        path: the file; what it held is replaced in one stroke or, on any failure, kept.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        FeatherError: onnxruntime's outputs differ from PyTorch's by more than 1e-5 of the largest.
        torch.onnx.OnnxExporterError: PyTorch cannot express the model in ONNX.
        OSError: the file cannot be written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs {error.name}: pip install 'torch-feather[onnx]'") from error
    model = copy.deepcopy(unwrap(model)).cpu().eval()
    # Two inputs: a batch of one would be taken for a constant.
    inputs = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(example.dtype)
    batches = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        model, (inputs,), dynamo=True, dynamic_shapes=batches, verbose=False
    )
    assert program is not None
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for batch in (inputs, inputs[:1]):
        with torch.no_grad():
            expected = model(batch)
        found = torch.from_numpy(
            session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
        )
        off = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        if not off <= TOLERANCE:
            raise FeatherError(
                f"onnxruntime's outputs differ from PyTorch's by {off:.1e} of the largest; "
                f"{path} was not written"
            )
    replace_file(Path(path), lambda file: file.write(data))

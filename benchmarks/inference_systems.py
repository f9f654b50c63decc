"""Systems that run a network on a CPU: PyTorch, torch.compile, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_feather.export import export_onnx

System = Callable[[Tensor], object]


def dense_systems(
    model: nn.Module, x: Tensor, threads: int, compiles: bool = True, narrow: bool = False
) -> dict[str, System]:
    """Return the dense systems that are installed, for inputs of the size of `x`.

    Args:
        model: the network.
        x: an input.
        threads: CPU threads.
        compiles: whether to return torch.compile, too, and the default precision of OpenVINO.
        narrow: whether to return OpenVINO in bfloat16, and in int8 if NNCF is installed. For int8,
            NNCF is calibrated on `x` alone: only the time has a meaning.
    """
    systems: dict[str, System] = {"PyTorch": model}
    if compiles:
        torch._inductor.config.freezing = True  # treat weights as constants, like the others
        systems["torch.compile"] = torch.compile(model, dynamic=False)
    try:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
            systems["onnxruntime"] = onnx_session(onnxruntime, path, threads)
    except ImportError:
        pass
    try:
        import openvino
    except ImportError:
        return systems
    graph = openvino.convert_model(model, example_input=x, input=list(x.shape))
    graphs: dict[str, tuple[Any, str | None]] = {"OpenVINO f32": (graph, "f32")}
    if compiles:
        graphs["OpenVINO default"] = graph, None
    if narrow:
        graphs["OpenVINO bf16"] = graph, "bf16"
        with suppress(ImportError):
            import nncf

            data = nncf.Dataset([x.numpy()])
            graphs["OpenVINO int8"] = nncf.quantize(graph, data, subset_size=1), "f32"
    for label, (network, precision) in graphs.items():
        systems[label] = openvino_request(openvino, network, threads, precision)
    return systems


def engines_on_pruned_weights(model: nn.Module, x: Tensor, threads: int) -> dict[str, System]:
    """Return the engines that are installed, for a pruned network and inputs of the size of `x`.

    ONNX Runtime reads sparse initializers, OpenVINO the same weights with their zeros.

    Args:
        model: takes one tensor and returns one tensor.
        x: an input.
        threads: CPU threads.
    """
    systems: dict[str, System] = {}
    with suppress(ImportError), tempfile.TemporaryDirectory() as folder:
        import onnxruntime

        path = Path(folder) / "model.onnx"
        export_onnx(model, x[:1], path, sparse_initializers=True)
        systems["onnxruntime, sparse"] = onnx_session(onnxruntime, path, threads)
    with suppress(ImportError):
        import openvino

        graph = openvino.convert_model(model, example_input=x, input=list(x.shape))
        systems["OpenVINO f32, pruned"] = openvino_request(openvino, graph, threads, "f32")
    return systems


def onnx_session(onnxruntime: Any, path: Path, threads: int) -> System:
    """Return a function that runs an ONNX file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def openvino_request(openvino: Any, graph: Any, threads: int, precision: str | None) -> System:
    """Return a function that runs a graph of OpenVINO."""
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings["ENABLE_CPU_PINNING"] = False  # other systems use the threads too
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x.numpy()], share_inputs=True)

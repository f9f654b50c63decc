"""Dense systems that run a network on a CPU: PyTorch, torch.compile, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(path, options)
        name = session.get_inputs()[0].name
        systems["onnxruntime"] = lambda x: session.run(None, {name: x.numpy()})
    except ImportError:
        pass
    try:
        import openvino
    except ImportError:
        return systems
    graph = openvino.convert_model(model, example_input=x, input=list(x.shape))
    core = openvino.Core()
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
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        settings["ENABLE_CPU_PINNING"] = False  # other systems use the threads too
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        systems[label] = lambda x, request=request: request.infer([x.numpy()], share_inputs=True)
    return systems

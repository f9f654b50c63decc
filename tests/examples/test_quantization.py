"""Quantization to int8 after sparse training: zeros stay zeros. Tested for torchao and NNCF."""

import numpy as np
import pytest
import torch
from torch import nn

import torch_feather as feather

pytestmark = pytest.mark.apps


def sparse_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    return sparsifier.finalize().eval()


def zeros(model):
    """Return the zeros of each weight."""
    weights = (m.weight for m in model.modules() if isinstance(m, nn.Linear))
    return [(w.dequantize() if hasattr(w, "dequantize") else w).detach() == 0 for w in weights]


def test_int8_weights_of_torchao_have_all_zeros():
    """Rounding may add zeros, but no zero becomes another value."""
    quantization = pytest.importorskip("torchao.quantization")
    model = sparse_model()
    before, x = zeros(model), torch.randn(16, 64)
    expected = model(x)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model[0].weight) is not nn.Parameter  # otherwise, nothing was quantized
    assert not any((was & ~now).any() for was, now in zip(before, zeros(model), strict=True))
    assert sum(int(z.sum()) for z in before) == round(0.9 * 48 * (64 + 10))
    assert (model(x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_int8_weights_of_nncf_have_all_zeros():
    """The tensors that OpenVINO computes with; NNCF calibrates the ranges of activations."""
    nncf, openvino = pytest.importorskip("nncf"), pytest.importorskip("openvino")
    model = sparse_model()
    before, x = zeros(model), torch.randn(32, 64)
    expected = model(x)
    graph = openvino.convert_model(model, example_input=x)
    # A CPU without VNNI adds pairs of products in 16 bits, where they can saturate. With this
    # setting weights use half of the range of int8, and no sum saturates on any CPU.
    settings = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    calibration = nncf.Dataset([x.numpy()])
    graph = nncf.quantize(graph, calibration, subset_size=1, advanced_parameters=settings)
    found = [
        torch.from_numpy(op.data.copy())
        for op in graph.get_ops()
        if op.get_type_name() == "Constant" and op.data.dtype == np.int8 and op.data.ndim > 1
    ]
    weights = sorted(found, key=torch.numel, reverse=True)  # OpenVINO has another order
    assert [w.shape for w in weights] == [z.shape for z in before]
    assert not any((was & (now != 0)).any() for was, now in zip(before, weights, strict=True))
    assert all((w != 0).any() for w in weights)
    answer = torch.from_numpy(openvino.compile_model(graph, "CPU")(x.numpy())[0])
    assert (answer - expected).abs().max() < 0.05 * expected.abs().max()

"""Keras on PyTorch: the file that Keras writes has exact zeros."""

import importlib.util

import pytest
import torch
from example_cases import expected_zeros, load

import torch_feather as feather

pytestmark = pytest.mark.apps
if importlib.util.find_spec("keras") is None:  # importing it would choose another backend
    pytest.skip("keras is not installed", allow_module_level=True)


def test_a_saved_model_has_exact_zeros(created, tmp_path):
    example = load("keras_model")
    model = example.train(tmp_path, 2)
    model.save("model.keras")
    loaded = example.keras.saving.load_model("model.keras")
    kernels = [v.value for v in loaded.trainable_variables if v.path.endswith("kernel")]
    assert len(kernels) == len(created[-1].masks()) == 3
    assert sum(int((kernel == 0).sum()) for kernel in kernels) == expected_zeros(created[-1])
    x = torch.rand(4, 8, 8, 1)
    assert torch.equal(model(x), loaded(x))


def test_a_compiled_model_computes_the_same(created, tmp_path):
    pytest.importorskip("llvmlite")
    model = load("keras_model").train(tmp_path, 2).eval()
    x = torch.rand(4, 8, 8, 1)
    compiled = feather.compile_sparse(model, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x, training=False), rtol=1e-4, atol=1e-5)
    with pytest.raises(feather.ConfigurationError, match="nothing to count"):
        feather.count_flops(model, x)

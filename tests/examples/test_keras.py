"""Keras on PyTorch: the file that Keras writes has exact zeros."""

import importlib.util

import pytest
import torch
from example_cases import expected_zeros, load

pytestmark = pytest.mark.apps
if importlib.util.find_spec("keras") is None:  # importing it would choose another backend
    pytest.skip("keras is not installed", allow_module_level=True)


def test_a_saved_model_has_exact_zeros(created, tmp_path):
    example = load("keras_model")
    model = example.train(tmp_path, 2)
    model.save("model.keras")
    loaded = example.keras.saving.load_model(
        "model.keras", custom_objects={"SparseModel": example.SparseModel}
    )
    kernels = [v.value for v in loaded.trainable_variables if v.path.endswith("kernel")]
    assert len(kernels) == len(created[-1].masks()) == 3
    assert sum(int((kernel == 0).sum()) for kernel in kernels) == expected_zeros(created[-1])
    x = torch.rand(4, 8, 8, 1)
    assert torch.equal(model(x), loaded(x))

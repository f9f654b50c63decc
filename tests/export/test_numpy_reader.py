"""The reader in docs/files.md returns the bits that the library wrote."""

import re
from pathlib import Path

import pytest
import torch

import torch_feather as feather

PAGE = Path(__file__).parents[2] / "docs" / "files.md"
READER = next(
    block
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    if "def read_sparse" in block
)


def test_it_is_short_and_needs_only_numpy():
    assert len(READER.splitlines()) < 60
    assert re.findall(r"^import (\w+)", READER, re.MULTILINE) == ["json", "math", "numpy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_reads_files_of_the_library(dtype, tmp_path):
    names = {}
    exec(compile(READER, "reader", "exec"), names)
    tensors = {
        f"density {d}": torch.randn(99, 101).masked_fill(torch.rand(99, 101) >= d, 0.0).to(dtype)
        for d in (0, 0.0005, 0.01, 0.1, 0.3, 0.6, 1)
    }
    tensors |= {
        "tied": tensors["density 0.1"],
        "special": torch.tensor([1e-45, float("nan"), float("-inf")] + [0.0] * 999).to(dtype),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "bytes": torch.eye(50, dtype=torch.uint8),
        "mask": torch.eye(50).bool(),
        "wide": torch.eye(1, 70_000),
    }
    feather.save_sparse(tensors, tmp_path / "file")
    read = names["read_sparse"](tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        expected = expected.numpy()
        assert (read[name].dtype, read[name].shape) == (expected.dtype, expected.shape), name
        assert read[name].tobytes() == expected.tobytes(), name

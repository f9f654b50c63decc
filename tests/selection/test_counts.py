"""Counts over the values of a tensor are those of their definition, for all types and layouts."""

import pytest
import torch

from torch_feather import devices
from torch_feather.weights.counts import count_nan, count_not_finite, count_true, count_zeros

LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t(),
    "channels last": lambda t: t.view(10, 301, 10, 70).to(memory_format=torch.channels_last),
    "strided": lambda t: t[:, ::2],
    "expanded": lambda t: t[:, :1].expand(-1, 40),
    "one": lambda t: t[0, 0],
    "empty": lambda t: t[:0],
}


@pytest.fixture(params=["cpu", "device"])
def way(request, monkeypatch):
    if request.param == "device":
        monkeypatch.setattr(devices, "synchronizes", lambda device: True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_counts(way, dtype, layout):
    w = torch.randn(3010, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[w.abs() < 0.1] = 0.0
    w[:, 3] = -0.0
    w[5] = torch.nan
    w[:, 7] = torch.inf
    w[8, :20] = -torch.inf
    w = LAYOUTS[layout](w)
    for count, expected in (
        (count_zeros, w == 0),
        (count_nan, w.isnan()),
        (count_not_finite, ~w.isfinite()),
    ):
        found = count(w)
        assert found.dtype == torch.int64
        assert found.shape == ()
        assert found == expected.sum()
    assert count_true(w > 0) == (w > 0).sum()


def test_a_count_leaves_the_storage_resizable():
    w = torch.ones(10)
    assert count_zeros(w) == 0
    w.untyped_storage().resize_(0)  # as fully_shard frees a gathered parameter

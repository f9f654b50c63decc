"""Single kernels: the accuracy of activation functions, and the order of work items."""

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runtime_cases import compiled, pruned
from torch import nn

from torch_feather.runtime.kernels import ACTIVATIONS, OPERATION, library
from torch_feather.runtime.steps import Sparse
from torch_feather.runtime.workspace import Workspace

ROW = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64)
ITEMS = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)

# Functions with a small relative error, and the inputs where their results are normal numbers.
RELATIVE = {
    "sigmoid": (torch.sigmoid, -86, 86),
    "silu": (F.silu, -80, 80),
    "tanh": (torch.tanh, -20, 20),
}


def activated(name, width, x):
    """Return the results of an activation function for whole vectors."""
    x = np.append(x, np.zeros(width, np.float32))
    out = np.full_like(x, np.nan)
    function = ROW(library().activation(name, width))
    function(x.ctypes.data, out.ctypes.data, None, len(x) // width - 1)
    assert np.isnan(out[-width:]).all()  # nothing is written behind the row
    return torch.from_numpy(out[:-width]).double()


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("width", library().target.widths)
def test_relative_errors_of_activations(name, width):
    """They are those of the documentation; without fused multiply-adds they may be larger."""
    function, low, high = RELATIVE[name]
    target = library().target
    fused = "+fma" in target.features or target.architecture in ("aarch64", "arm64")
    x = np.concatenate([np.linspace(low, high, 2**16), np.linspace(-8, 8, 2**16)])
    x = x.astype(np.float32)
    expected = function(torch.from_numpy(x).double())
    error = (activated(name, width, x) - expected).abs() / expected.abs()
    assert float(error.max()) < (1e-6 if fused else 6e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", library().target.widths)
def test_large_numbers_and_nan(name, width):
    """Minus infinity times zero may be NaN or 0."""
    function = {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "sigmoid": torch.sigmoid,
        "tanh": torch.tanh, "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish,
        "silu": F.silu, "gelu": F.gelu,
    }[name]  # fmt: skip
    values = [-np.inf, -1e38, -1000, -100, -88, 0, 88, 100, 1000, 1e18, np.inf, np.nan]
    x = np.array([*values, *[0] * (2 * width)], np.float32)[: -(-len(values) // width) * width]
    x[-1:].view(np.int32)[:] = 0x7FC00001  # NaN with other bits
    found, expected = activated(name, width, x), function(torch.from_numpy(x)).double()
    found[0], expected[0] = found[0].nan_to_num(0.0), expected[0].nan_to_num(0.0)
    assert torch.equal(found.isnan(), expected.isnan())
    finite = expected.isfinite() & found.isfinite()
    assert bool((finite | (found == expected) | expected.isnan()).all()), (found, expected)
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-5, atol=1e-33)


@pytest.mark.parametrize("count", range(1, 11))
def test_rows_of_every_length(count):
    """Vectors are computed several at once, and the rest one by one."""
    width = library().target.widths[0]
    x = np.linspace(-5, 5, 12 * width).astype(np.float32)
    whole = activated("silu", width, x)
    assert torch.equal(activated("silu", width, x[: count * width].copy()), whole[: count * width])


@pytest.mark.parametrize("groups", [1, 12])
@pytest.mark.parametrize("threads", [1, 3])
def test_work_items_may_be_divided_anywhere(groups, threads):
    """Each item is one tile of one block, wherever a thread begins."""
    torch.manual_seed(0)
    model = pruned(nn.Conv2d(12, 12, 3, padding=1, groups=groups)).eval()
    x = torch.randn(1, 12, 21, 17)
    workspace = Workspace(compiled(model, x, threads=threads)._for_sizes(x).pool.plan)
    workspace(x)
    step = next(s for call in workspace.calls for s in call.steps if isinstance(s, Sparse))
    records, out, operation = workspace.records, step.out, np.zeros(1, OPERATION)[0]
    records.convolution(step, operation)
    kernel, record = ITEMS(int(operation["kernel"])), int(operation["record"])
    items = int(operation["items"])
    layout, batch = out.layout.root(), len(x)
    first = layout.edge - layout.lead
    stop = layout.edge + out.channels * out.channel_stride(batch)
    written = records.memory_of(out)[first:stop]  # with all padding
    written.fill_(torch.nan)
    kernel(record, 0, items)
    expected = written.clone()
    assert items > 3
    assert not expected.isnan().any()
    assert not expected[: layout.lead].any()
    for _ in range(20):
        written.fill_(torch.nan)
        a, b = sorted(torch.randint(0, items + 1, (2,)).tolist())
        for first, last in ((b, items), (0, a), (a, b)):
            kernel(record, first, last)
        assert torch.equal(written, expected)


class Ghost(nn.Module):
    """A residual sum of a concatenation, a difference and a product of planes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(16, 16, 1)
        self.d = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16)

    def forward(self, x):
        y = self.a(x)
        y = torch.cat([y, self.b(y)], 1)
        z = self.c(y) - y
        return self.d(z * y + z)


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_and_products_of_planes_are_machine_code(threads):
    torch.manual_seed(0)
    model, x = pruned(Ghost()).eval(), torch.randn(2, 8, 19, 23)
    network = compiled(model, x, threads=threads)
    calls = Workspace(network._for_sizes(x).pool.plan).calls
    assert [bool(call.steps) for call in calls] == [True]
    names = [getattr(step, "name", "") for step in calls[0].steps]
    assert {"add", "subtract", "multiply"} <= set(names)
    with torch.inference_mode():
        expected = model(x)
    assert float((network(x) - expected).abs().max() / expected.abs().max()) < 2e-6

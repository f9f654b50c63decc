"""One- and three-dimensional and transposed convolutions in native libraries and in C99."""

import pytest
import torch
import torch.nn.functional as F
from native_cases import TOLERANCE, error, library, needs_gcc, pruned
from test_native_operations import run_c
from torch import nn

import torch_feather as feather
from torch_feather.native.errors import NativeExportError

pytestmark = needs_gcc


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3, dilation=2), nn.Conv1d(8, 6, 4, 2, padding=1, groups=2)
        self.norm, self.up = nn.BatchNorm1d(6), nn.ConvTranspose1d(6, 4, 3, 2, bias=False)

    def forward(self, x):
        x = self.a(F.pad(x, (4, 0)))
        left, right = x.chunk(2, 1)
        x = torch.cat([left.tanh() * right.sigmoid(), left], 1)
        return self.up(F.relu(self.norm(self.b(F.max_pool1d(x, 2)))))


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 8, 4, 2, 1, bias=False)
        self.norm, self.same = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 3, padding=1)
        self.odd = nn.ConvTranspose2d(4, 6, 3, (3, 2), (1, 0), (1, 0), groups=2)

    def forward(self, x):
        return self.odd(self.same(F.relu6(self.norm(self.up(x)))))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.b = nn.Conv3d(6, 4, 3, 2)

    def forward(self, x):
        return self.b(F.relu(self.norm(self.a(x))))


CASES = {
    "1-d": (Sequence, (2, 3, 23)),
    "transposed": (Up, (2, 3, 6, 5)),
    "3-d": (Volume, (2, 2, 6, 7, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_native_and_c_agree_with_pytorch(case, tmp_path):
    kind, shape = CASES[case]
    model = pruned(kind(), 0.5)
    feather.export_native(model, torch.zeros(shape), tmp_path / "native")
    feather.export_c(model, torch.zeros(shape), tmp_path / "c")
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
    assert error(library(tmp_path / "native")(x.numpy()), expected) < TOLERANCE
    (result,) = run_c(tmp_path / "c", x, [tuple(expected.shape)])
    assert error(result, expected) < TOLERANCE


class Pooled(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_refused(kind, tmp_path):
    with pytest.raises(NativeExportError, match=rf"support {kind.__name__.lower()}.*onnx"):
        feather.export_c(Pooled(kind), torch.zeros(1, 5, 3), tmp_path)


def test_strides_without_a_kernel_are_refused(tmp_path):
    with pytest.raises(NativeExportError, match="conv_transpose2d"):
        feather.export_c(nn.ConvTranspose2d(3, 4, 5, 5), torch.zeros(1, 3, 4, 4), tmp_path)

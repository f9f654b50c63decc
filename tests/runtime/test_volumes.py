"""Three-dimensional convolutions run sparse: their slices are channels."""

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import DENSE, check, pruned, sparse_layers
from torch import nn

FORMS = {  # in, out, kernel, depth, height, width, options
    "1x1x1": (3, 4, 1, 2, 5, 4, {}),
    "3x3x3": (3, 4, 3, 5, 6, 7, {"padding": 1}),
    "3x3x3 valid": (3, 4, 3, 5, 6, 7, {}),
    "stride 2": (3, 4, 3, 7, 6, 9, {"padding": 1, "stride": 2}),
    "mixed": (2, 3, (2, 3, 1), 6, 5, 7, {"stride": (2, 1, 3), "padding": (0, 2, 0)}),
    "dilated": (2, 3, 3, 9, 7, 8, {"dilation": (3, 1, 2), "padding": (3, 0, 2), "bias": False}),
    "groups": (6, 4, 3, 4, 5, 6, {"padding": 1, "groups": 2}),
    "depthwise, stride 2": (4, 4, 3, 5, 5, 6, {"padding": 1, "groups": 4, "stride": 2}),
    "one voxel": (3, 4, 3, 1, 1, 1, {"padding": 1}),
}


@pytest.mark.parametrize("form", FORMS)
def test_convolutions(form):
    channels, out, kernel, *size, options = FORMS[form]
    model = pruned(nn.Sequential(nn.Conv3d(channels, out, kernel, **options)))
    network = check(model, (channels, *size))
    assert sparse_layers(network) == ["0.weight"]
    model[0].weight.data[1:] = 0
    check(model, (channels, *size))


class Net(nn.Module):
    """Batch norm, residual sums, activations, pooling, and functions that PyTorch computes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(2, 6, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(6))
        self.a, self.norm = nn.Conv3d(6, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.b, self.pool = nn.Conv3d(6, 6, 1), nn.MaxPool3d(2)
        self.c, self.head = nn.Conv3d(12, 4, 3, padding="same"), nn.Linear(4, 3)
        self.register_buffer("scale", torch.rand(6, 1, 1, 1))
        self.register_buffer("slices", torch.rand(6, 1, 1))

    def forward(self, x):
        x = self.stem(x).relu()
        y = (self.norm(self.a(x)) + x).clamp(0, 6)
        z = F.silu(self.b(y) * self.scale) + self.b(x) * self.slices * y.tanh()
        z = torch.cat([self.pool(z), self.pool(x)], 1)
        w = self.c(z)
        return self.head(w.mean((2, 3, 4))), z[:, 1:3], y.flatten(1), w.permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_network(threads):
    network = check(pruned(Net()), (2, 6, 9, 8), threads=threads)
    assert len(sparse_layers(network)) >= 4
    check(pruned(Net()), (2, 6, 9, 8), tuning=DENSE)

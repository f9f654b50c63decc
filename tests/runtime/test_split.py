"""Inputs of layers with stride, which are split into phases, maybe before a 1x1 convolution."""

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import TOLERANCE, compiled, error, pruned
from torch import nn

from torch_feather.runtime.steps import Copy

CHANNELS = 12  # of the image that the first layer computes
MOVED, WIDE = [1, CHANNELS], [1, 4 * CHANNELS]  # channels that are copied


class Bottleneck(nn.Module):
    """A layer, a 1x1 convolution that widens it, and a depthwise convolution with stride."""

    def __init__(self, kernel=3, stride=2, twice=False, activation=F.hardswish):
        super().__init__()
        self.twice, self.activation, wide = twice, activation, 4 * CHANNELS
        self.stem = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.expand = nn.Conv2d(CHANNELS, wide, 1)
        self.norm = nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide)

    def forward(self, x):
        wide = self.activation(self.norm(self.expand(self.stem(x).relu())))
        found = self.depthwise(wide)
        return found + wide.mean() if self.twice else found


CASES = {  # (network, size, channels of the copies)
    "5x5": (Bottleneck(5), (16, 24), MOVED),
    "3x3": (Bottleneck(3), (14, 14), MOVED),
    "few phases": (Bottleneck(1), (8, 8), MOVED),
    "other stride of columns": (Bottleneck(3, (1, 3)), (7, 9), MOVED),
    "activation that maps 0 to another number": (
        Bottleneck(activation=F.sigmoid), (10, 8), MOVED,
    ),
    "phases of unequal size": (Bottleneck(3), (9, 8), WIDE),
    "another use of the wide value": (Bottleneck(3, twice=True), (8, 8), WIDE),
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_phases(name, threads):
    torch.manual_seed(0)
    model, size, channels = CASES[name]
    model = pruned(model, 0.5)
    x = torch.randn(2, 1, *size)
    network = compiled(model, x, threads=threads)
    copies = [s for s in network.plan.steps if isinstance(s, Copy)]
    assert [s.out.channels * s.out.phases // len(s.phases) for s in copies] == channels
    with torch.no_grad():
        for given in (x, x[:1], torch.cat([x, -x, 2 * x]), x):
            assert error(network(given), model(given)) < TOLERANCE


def test_nan_stays_in_its_phase_and_sample():
    model = pruned(Bottleneck(3), 0.0)
    x = torch.randn(3, 1, 12, 12)
    x[1, 0, 5, 6] = torch.nan
    with torch.no_grad():
        found, expected = compiled(model, x)(x), model(x)
    assert torch.equal(found.isnan(), expected.isnan())

"""Peak memory while a network is compiled, and what the network keeps, in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from runtime_cases import DENSE, SPARSE, TOLERANCE, compiled, error, pruned
from torch import nn

import torch_feather
from torch_feather.runtime.ownership import shared_parameters
from torch_feather.runtime.taps import Taps

CLEAR = Path("/proc/self/clear_refs")  # writing 5 sets the peak to the current memory

SCRIPT = """
import gc
from pathlib import Path

import torch
from torch import nn
from torch_feather import compile_sparse

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

def network(channels, layers):
    parts = [nn.Conv2d(3, channels, 3, bias=False)]
    for _ in range(layers):
        parts += [nn.BatchNorm2d(channels), nn.ReLU()]
        parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
    model = nn.Sequential(*parts, nn.BatchNorm2d(channels)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= torch.rand_like(p) < 0.05
    return model

torch.set_num_threads(1)
x = torch.zeros(1, 3, 12, 12)
compile_sparse(network(32, 2), x)  # what is imported and compiled once does not count
model = network(512, 5)
weights = sum(4 * p.numel() for p in model.parameters())
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
compiled = compile_sparse(model, x)
peak = memory("VmHWM") - before
compiled(x)
del model
gc.collect()
print(weights, peak, memory("VmRSS") - before)
"""


@pytest.mark.skipif(not os.access(CLEAR, os.W_OK), reason="needs Linux")
def test_the_peak_is_below_twice_the_model():
    """The weights of the model itself count once. After it is deleted, less than they remain."""
    source = str(Path(torch_feather.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    weights, peak, kept = map(int, done.stdout.split())
    assert 40e6 < weights < 50e6
    assert peak < weights
    assert kept < 0  # above the model


class Mixed(nn.Module):
    """Layers and constants of many kinds, in parts of which nothing is fused into the weights."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8, 6, 6))
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.plain, self.grouped = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2)
        self.layer_norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(self.conv(x)) + self.table
        y = self.grouped(self.plain(self.up(y)).relu())
        y = self.linear(self.layer_norm(y.flatten(2).transpose(1, 2)))
        return self.lstm(y)[0] @ self.table[0, :4, 0]


@pytest.mark.parametrize("tuning", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("last", [False, True])
def test_the_network_shares_no_memory_with_the_model(tuning, last):
    """Also for batches of another size, which are captured later."""
    model, x = pruned(Mixed()), torch.randn(2, 3, 6, 6)
    if last:
        model = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        given = x, torch.cat([x, x[:1]])
        expected = [model(y) for y in given]
        network = compiled(model, x, tuning)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    for y, result in zip(given, expected, strict=True):
        assert error(network(y), result) < 10 * TOLERANCE


class Merging(nn.Linear):
    """Changes its weight when it is put into eval mode, as adapters do."""

    def train(self, mode=True):
        if not mode and self.training:
            self.weight.data += 1.0
        return super().train(mode)


def test_modules_that_write_weights_in_eval_mode_are_copied():
    model = nn.Sequential(Merging(4, 4))
    before = model[0].weight.clone()
    x = torch.randn(2, 4)
    result = compiled(model, x)(x)
    assert torch.equal(model[0].weight, before)
    assert error(result, model.eval()(x).detach()) < TOLERANCE
    assert shared_parameters(model)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_freed_weight_is_restored_from_its_nonzero_values(groups):
    model = pruned(nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.BatchNorm2d(6)))
    network = compiled(model, torch.randn(1, 4, 5, 5))
    (layer,) = {s.layer for s in network.plan.steps if hasattr(s, "layer")}
    assert layer.is_released
    assert layer.weight.untyped_storage().nbytes() == 4
    layer.fold()
    found, scale = layer.weight, model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    assert error(found, (model[0].weight * scale.view(-1, 1, 1, 1)).detach()) < TOLERANCE
    layer.taps = None
    assert (Taps.from_layer(layer).values != 0).all()

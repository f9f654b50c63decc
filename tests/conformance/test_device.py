"""Properties on a GPU, tested without one: tensors without data stand in for CUDA tensors.

An operation that would synchronize the host cannot be computed on them, and raises.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_feather as feather
from torch_feather import devices
from torch_feather.operators import Hard, Power
from torch_feather.selection import select
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.passes import write_effective
from torch_feather.weights.segments import Segment


@pytest.mark.parametrize("options", [{}, {"min_density": 0.01}, {"theta": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_never_synchronizes_the_host(without_gpu, options, dtype):
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = {"device": "cuda", "dtype": dtype}
        model = nn.Sequential(nn.Linear(30, 40, **like), nn.ReLU(), nn.Linear(40, 20, **like))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        feather.sparsify(model, optimizer, sparsity=0.9, total_steps=10, **options)
        for _ in range(3):
            for p in model.parameters():  # autograd itself wants a device
                p.grad = torch.randn_like(p)
                for pull_back in (p._backward_hooks or {}).values():
                    p.grad = pull_back(p.grad)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("operator", [Power(3.0), Power(1.0), Hard()], ids=str)
@pytest.mark.parametrize("fill", ["normal", "ties", "zeros"])
def test_effective_weights_on_a_device_equal_those_on_the_cpu(operator, fill, monkeypatch):
    monkeypatch.setattr("torch_feather.weights.passes.DEVICE_BLOCK", 1000)  # several blocks
    w = {"normal": torch.randn(70, 50), "ties": torch.randint(-4, 5, (70, 50)) / 8.0}
    w["zeros"] = torch.where(w["ties"].abs() < 0.3, 0.0, w["normal"])
    weights = LatentWeights([w[fill]])
    for k in (0, 1, 700, 3400):
        segments = [Segment(0, 3500, select(weights.magnitudes, torch.tensor(k)))]
        on_cpu, on_device = torch.empty(2, 70, 50)
        write_effective(weights, segments, operator, [on_cpu])
        with monkeypatch.context() as patch:
            patch.setattr(devices, "synchronizes", lambda _: True)
            write_effective(weights, segments, operator, [on_device])
        assert torch.equal(on_cpu == 0, on_device == 0)
        torch.testing.assert_close(on_cpu, on_device)

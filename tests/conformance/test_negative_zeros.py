"""A zero is a zero whatever its sign: in training, masks, counts and reports."""

import pytest
import torch
from torch import nn

import torch_feather as feather

OPTIONS = {
    "feather-flops": {"costs": {"0.weight": 1.0, "2.weight": 1.0}},
    "feather-asl+": {"dense_below": 0},
    "asl": {"dense_below": 0},
    "asl+": {"dense_below": 0},
}


def negate_zeros(model):
    """Write -0.0 in place of 0.0, as `w.mul_(mask)` does for negative weights."""
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.where(layer.weight == 0, -0.0, layer.weight))


def train(method, negate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = feather.sparsify(
        model, optimizer, method, sparsity=0.75, total_steps=6, **OPTIONS.get(method, {})
    )
    for _ in range(6):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if negate:
            negate_zeros(model)
        for name, mask in sparsifier.masks().items():
            assert torch.equal(mask, model.get_parameter(name) != 0)
    latent = {name: w.clone() for name, w in sparsifier.latent_weights().items()}
    return sparsifier.finalize(), latent


@pytest.mark.filterwarnings("ignore::torch_feather.FeatherWarning")
@pytest.mark.parametrize("method", feather.available_methods())
def test_signs_of_zeros_do_not_change_training(method):
    (model, latent), (other, same) = train(method, negate=False), train(method, negate=True)
    for name, w in latent.items():
        assert torch.equal(w, same[name])
    for w, u in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(w, u)
    assert feather.sparsity(model) == feather.sparsity(other) == 0.75


def test_reports_count_zeros_of_either_sign():
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[-0.0, 0.0, 1.0, -1.0], [-0.0, -0.0, -0.0, -0.0]])
    nn.init.ones_(model[2].weight)
    negate_zeros(model)
    assert feather.sparsity(model) == 6 / 12
    assert [layer.zeros for layer in feather.report(model).layers] == [6, 0]
    assert feather.count_flops(model, torch.ones(1, 4)).sparse == 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    feather.keep_zeros(model, optimizer)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    assert [layer.zeros for layer in feather.report(model).layers] == [6, 0]

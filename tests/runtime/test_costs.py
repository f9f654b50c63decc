"""The cost of a weight in milliseconds."""

import sys

import pytest
import torch
from torch import nn

import torch_feather as feather
from torch_feather.errors import ConfigurationError
from torch_feather.prunable import find_prunable
from torch_feather.runtime import RuntimeMissingError, kernels, layer_milliseconds

X = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))


def network():
    """Return a layer at 32 x 32 pixels, and one at 2 x 2 whose batch norm multiplies it by 0."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.AvgPool2d(16),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    nn.init.zeros_(model[4].weight)  # a common initialization of residual blocks
    return model


@pytest.fixture(scope="module")
def costs():
    return layer_milliseconds(network(), X, 0.5)


def test_every_prunable_weight_has_a_cost_under_its_name(costs):
    assert costs.keys() == {p.name for p in find_prunable(network())}
    assert all(0 < cost < 1 for cost in costs.values())


def test_weights_cost_more_at_more_pixels(costs):
    assert costs["0.weight"] > 4 * costs["3.weight"]  # 256 times the pixels


def test_training_targets_latency_and_reaches_exactly_the_sparsity(costs):
    kept = {}
    for gamma in (0.0, 0.2):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        sparsifier = feather.sparsify(
            model, optimizer, "feather-flops", sparsity=0.8, total_steps=3, costs=costs,
            gamma=gamma,
        )  # fmt: skip
        for _ in range(3):
            model(torch.cat([X, -X])).square().mean().backward()
            optimizer.step()
        sparsifier.finalize()
        weights = [p.parameter for p in find_prunable(model)]
        size = sum(w.numel() for w in weights)
        assert sum(int((w == 0).sum()) for w in weights) == round(0.8 * size)
        kept[gamma] = int(model[0].weight.count_nonzero())
    assert kept[0.2] < kept[0.0]


def test_the_budget_has_the_unit_of_the_costs():
    # Constants: how close pruning can come to a budget depends on the costs.
    costs = {"0.weight": 1e-5, "3.weight": 1e-7, "6.weight": 2e-7}

    def cost(model):
        kept = {p.name: int(p.parameter.count_nonzero()) for p in find_prunable(model)}
        return sum(costs[name] * count for name, count in kept.items())

    def start(**options):
        model = network()
        feather.sparsify(
            model, torch.optim.SGD(model.parameters(), lr=0.01), "feather-flops", sparsity=0.9,
            total_steps=1, schedule="constant", costs=costs, **options,
        )  # fmt: skip
        return cost(model)

    budget = 0.5 * start(gamma=0.0)
    assert 0.8 * budget <= start(budget=budget) <= budget


def test_a_shared_weight_has_one_cost():
    layer = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert layer_milliseconds(model, torch.randn(1, 4, 8, 8), 0.5).keys() == {"0.weight"}


def test_the_model_and_the_random_state_do_not_change():
    model = nn.Linear(64, 8)
    before, state = model.weight.clone(), torch.random.get_rng_state()
    layer_milliseconds(model, torch.ones(1, 64), 0.5)
    assert model.training
    assert torch.equal(model.weight, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("sparsity", [1.0, -0.1])
def test_a_sparsity_outside_of_the_interval_is_an_error(sparsity):
    with pytest.raises(ConfigurationError, match=r"sparsity must be in \[0, 1\)"):
        layer_milliseconds(network(), X, sparsity)


def test_without_llvmlite_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    kernels.llvm.cache_clear()
    with pytest.raises(RuntimeMissingError, match=r"pip install 'torch-feather\[runtime\]'"):
        layer_milliseconds(network(), X, 0.5)

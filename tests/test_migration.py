"""docs/migrate.md: what other libraries leave can be trained on. Its code runs in test_docs.py."""

import warnings

import pytest
import torch

import torch_feather as feather

pytestmark = pytest.mark.apps


def network():
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


def train(model, sparsity, steps=6):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = feather.sparsify(model, optimizer, sparsity=sparsity, total_steps=steps)
    before = sparsifier.sparsity
    for _ in range(steps):
        model(torch.randn(8, model[0].in_features)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, feather.sparsity(sparsifier.finalize())


def test_training_goes_on_from_the_zeros_of_torch_ao_pruning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruning = pytest.importorskip("torch.ao.pruning")
    theirs = network()
    sparsifier = pruning.WeightNormSparsifier(
        sparsity_level=0.75, sparse_block_shape=(1, 1), zeros_per_block=1
    )
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    assert not any("mask" in name for name in theirs.state_dict())  # as the page says
    sparsifier.squash_mask()
    model = network()
    model.load_state_dict(theirs.state_dict())
    given, final = train(model, 0.9)
    size = 64 * 32 + 32 * 10
    assert given == 0.75
    assert final == round(0.9 * size) / size


def test_a_network_of_torch_pruning_is_trained_as_any_other():
    tp = pytest.importorskip("torch_pruning")
    model = network()
    pruner = tp.pruner.MagnitudePruner(
        model,
        torch.randn(1, 64),
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model[2]],
    )
    pruner.step()
    assert model[0].out_features == 16
    size = 64 * 16 + 16 * 10
    assert train(model, 0.9) == (0.0, round(0.9 * size) / size)

"""Parts of engine, weights and selection: properties that a change of one line would break.

Each test was written for a change of the source that a mutation run made and did not notice; see
results/mutation.md.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import _apply_optimizer_in_backward

import torch_feather as feather
from torch_feather import ConfigurationError, StateError, devices
from torch_feather.engine.first_step import check_not_replaced
from torch_feather.engine.fixed_memory import packed
from torch_feather.engine.sharding import check_shards
from torch_feather.engine.wrappers import WRITE_OUTSIDE_STEP
from torch_feather.selection.cpu import SMALL, select_cpu
from torch_feather.selection.device import select_device
from torch_feather.weights.latent import LatentWeights, copy_all
from torch_feather.weights.passes import adopt_written
from torch_feather.weights.rows import multiply_rows
from torch_feather.weights.selecting import select_weights
from torch_feather.weights.shards import local


@pytest.mark.parametrize(("k", "pruned"), [(-3, 0), (0, 0), (2, 2), (99, 5)])
def test_a_count_on_the_device_is_clamped(k, pruned):
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    assert int(select_device(scores, torch.tensor(k)).pruned(scores, 0).sum()) == pruned


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_values_per_weight_have_the_wide_type(dtype):
    weights = LatentWeights([torch.randn(4, 5).to(dtype)])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert weights.per_weight(0.5).flat.dtype == wide


def trained(method: str = "feather", **options):
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(model, optimizer, method, sparsity=0.5, total_steps=2, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    return model, sparsifier


def test_the_right_number_of_zeros_at_wrong_positions_is_pruned_again():
    model, sparsifier = trained(pattern="2:4")
    with torch.no_grad():
        groups = model.weight.view(-1, 4)
        assert ((groups == 0).sum(1) == 2).all()
        groups[0] = 1.0
        groups[1] = 0.0
    with pytest.warns(UserWarning, match="at invalid positions"):
        sparsifier.finalize()
    assert ((model.weight.view(-1, 4) == 0).sum(1) == 2).all()


def test_a_step_of_one_pass_where_two_are_set_is_warned_of():
    with pytest.warns(UserWarning, match="passes=2"):
        trained("probmask", passes=2)


class TwoPhases(torch.optim.SGD):
    def first_step(self):
        pass

    def second_step(self):
        pass


@pytest.mark.parametrize("phase", ["first_step", "second_step"])
def test_no_phase_of_sam_runs_outside_of_step(phase):
    model = nn.Linear(10, 10)
    optimizer = TwoPhases(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=2)
    with pytest.raises(StateError, match=phase):
        getattr(optimizer, phase)()


@pytest.mark.parametrize("k", [1, 3, SMALL // 2])
def test_few_of_many_scores_are_selected_on_the_cpu(k):
    scores = torch.from_numpy(np.random.default_rng(0).random(SMALL + 100, dtype=np.float32))
    assert int(select_cpu(scores.clone, k).pruned(scores, 0).sum()) == k


def test_complex_weights_are_an_error_that_names_their_type():
    model = nn.Linear(8, 8, dtype=torch.complex64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"weight is torch\.complex64"):
        feather.sparsify(model, optimizer, sparsity=0.5, total_steps=2)


@pytest.mark.parametrize("attribute", ["optimizer", "base_optimizer"])
def test_an_optimizer_within_a_wrapper_that_writes_outside_of_step_is_an_error(attribute):
    model = nn.Linear(8, 8)
    kind = type(WRITE_OUTSIDE_STEP[0], (torch.optim.SGD,), {})
    wrapper = torch.optim.SGD(model.parameters(), lr=0.1)
    setattr(wrapper, attribute, kind(model.parameters(), lr=0.1))
    with pytest.raises(ConfigurationError, match="writes parameters outside of step"):
        feather.sparsify(model, wrapper, sparsity=0.5, total_steps=2)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_in_backward_optimizers_under_data_parallelism_are_an_error(one_process):
    model = nn.Linear(8, 8)
    parallel = nn.parallel.DistributedDataParallel(model)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    optimizers = [p._in_backward_optimizers[0] for p in model.parameters()]
    with pytest.raises(ConfigurationError, match="_apply_optimizer_in_backward"):
        feather.sparsify(parallel, optimizers, sparsity=0.5, total_steps=2)


SHARDED = {
    "global": ("feather", {}),
    "each layer": ("feather", {"allocation": "uniform"}),
    "asl": ("asl", {}),
}


@pytest.mark.parametrize("case", SHARDED)
def test_shards_of_one_process_train_as_plain_weights(case, one_process):
    method, options = SHARDED[case]
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 40))
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        feather.sparsify(model, optimizer, method, sparsity=0.8, total_steps=4, **options)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 40)).square().mean().backward()
            if step == 2:
                with torch.no_grad():
                    local(model[0].weight)[3] = 2.0  # written from outside
            optimizer.step()
        found.append([local(p).detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*found)
    assert (found[0][0][3] > 0.5).all()


def test_shards_that_change_after_sparsify_are_an_error(one_process):
    model = nn.Linear(40, 30)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=4).step.training
    check_shards(training.weights, [model.weight])
    with pytest.raises(StateError, match="shards of the model changed"):
        check_shards(training.weights, [local(model.weight)])


@pytest.mark.parametrize(("order", "pairs"), [([0, 1, 2], 1), ([2, 0, 1], 3)])
def test_numbers_that_fill_memory_in_one_order_are_copied_as_one(order, pairs):
    old, new = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    targets, sources = packed(old.unbind(), [new[i] for i in order])
    copy_all(targets, sources)
    assert len(targets) == pairs
    assert torch.equal(old, new[order])


@pytest.mark.parametrize("size", [4, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_infinite_scores_on_the_device_are_pruned_before_nan(size, dtype):
    scores = torch.rand(size, dtype=dtype)
    scores[1], scores[2] = torch.nan, torch.inf
    for k in (size - 2, size - 1):
        cutoff = select_device(scores, torch.tensor(k))
        pruned = cutoff.pruned(scores)
        assert int(pruned.sum()) == k
        assert not pruned[1]
        assert bool(pruned[2]) == (k == size - 1)


def test_scaled_scores_have_the_same_cutoff_on_a_device(monkeypatch):
    torch.manual_seed(0)
    weights = LatentWeights([torch.randn(30, 40), torch.randn(50)])
    scales = [torch.tensor(0.5), torch.tensor(2.0)]
    cutoffs = []
    for on_device in (False, True):
        monkeypatch.setattr(devices, "synchronizes", lambda _, found=on_device: found)
        cutoffs.append(select_weights(weights, torch.tensor(700), scales))
    assert [float(cutoff.value) for cutoff in cutoffs] == [float(cutoffs[0].value)] * 2


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_part_are_multiplied(width, dtype):
    factors = torch.tensor([2.0, 3.0, 5.0, 7.0])
    expected = factors.repeat_interleave(width).to(dtype)
    for start in range(4 * width):
        for stop in range(start + 1, 4 * width + 1):
            part = torch.ones(stop - start, dtype=dtype)
            multiply_rows(part, start, width, factors.to(dtype))
            assert torch.equal(part, expected[start:stop])


def test_written_values_of_several_tensors_are_adopted_on_a_device(monkeypatch):
    torch.manual_seed(0)
    latent = [torch.randn(4, 5), torch.randn(6)]
    effective = [w * (w.abs() > 0.5) for w in latent]
    written = [u.clone() for u in effective]
    written[0][0, 0], written[1][3] = 7.0, 8.0
    expected = [
        torch.where(a == b, w, a) for w, a, b in zip(latent, written, effective, strict=True)
    ]
    for on_device in (False, True):
        monkeypatch.setattr(devices, "synchronizes", lambda _, found=on_device: found)
        weights = LatentWeights(latent)
        adopt_written(weights, [0, 1], written, effective)
        assert all(map(torch.equal, weights.views, expected))


@pytest.mark.parametrize(("zeros", "fits"), [([0, 1], True), ([1, 2], False), ([0], True)])
def test_effective_weights_of_another_process_are_noticed(zeros, fits):
    pruned, parameter = torch.tensor([True, True, False, False]), torch.ones(4)
    parameter[zeros] = 0.0
    if fits:
        check_not_replaced([pruned], [parameter])
        return
    with pytest.raises(StateError, match="another process"):
        check_not_replaced([pruned], [parameter])

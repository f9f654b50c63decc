"""Parts of the core alone: properties that a change of one line would break.

Each test was written for a change of the source that a mutation run made and did not notice; see
results/mutation.md.
"""

import math
from dataclasses import dataclass, replace

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
from torch_feather.engine.sharding import check_shards
from torch_feather.engine.wrappers import WRITE_OUTSIDE_STEP
from torch_feather.methods import build_method
from torch_feather.methods.learned.asl import StandardDeviations
from torch_feather.methods.learned.asl_plus import FittedDeviations, log_density_slope
from torch_feather.methods.learned.base import Present
from torch_feather.methods.own_parameters import Adam, Momentum
from torch_feather.selection.cpu import SMALL, select_cpu
from torch_feather.selection.device import select_device
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.shards import local


def own_steps(step, count: int = 5) -> torch.Tensor:
    """Return x after steps along fixed gradients; `step` is called with x and the step's number."""
    torch.manual_seed(0)
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for number in range(1, count + 1):
            x.grad = torch.randn(7, dtype=torch.float64)
            step(x, number)
    return x.detach().clone()


def reference_steps(make) -> torch.Tensor:
    made = []

    def step(x: torch.Tensor, _: int) -> None:
        made.append(made[-1] if made else make(x))
        made[-1].step()

    return own_steps(step)


def test_momentum_with_decay_is_that_of_pytorch():
    velocity = torch.zeros(7, dtype=torch.float64)
    rule = Momentum(rate=0.5, momentum=0.8, decay=0.3)
    got = own_steps(lambda x, _: rule.step(x, velocity, 0.2, True))
    expected = reference_steps(
        lambda x: torch.optim.SGD([x], lr=0.1, momentum=0.8, weight_decay=0.3)
    )
    torch.testing.assert_close(got, expected)


def test_adam_is_that_of_pytorch():
    mean, square = torch.zeros(2, 7, dtype=torch.float64)
    rule, one = Adam(rate=0.1), torch.ones((), dtype=torch.float64)
    got = own_steps(lambda x, n: rule.step(x.grad, x.detach(), mean, square, torch.tensor(n), one))
    expected = reference_steps(lambda x: torch.optim.Adam([x], lr=0.1))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "wrong", [{"mean_decay": 1.0}, {"square_decay": 1.5}, {"rate": -1.0}, {"epsilon": -1.0}]
)
def test_adam_with_values_out_of_range_is_an_error(wrong):
    with pytest.raises(ConfigurationError, match=r"in \[0, 1\)"):
        Adam(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 1}, {"finetune": 1.0}, {"finetune": -0.1}, {"passes": 0}]
)
def test_probmask_names_the_values_that_are_out_of_range(wrong):
    ((option, value),) = wrong.items()
    with pytest.raises(ConfigurationError, match=f"{option}={value}"):
        build_method("probmask", sparsity=0.9, **wrong)


def test_published_str_passes_momentum_and_decay_on():
    method = build_method("str", sparsity=0.9, lr_multiplier=0.5, momentum=0.7, decay=0.01)
    assert method.optimizer == Momentum(0.5, 0.7, 0.01)


def test_a_budget_and_a_bias_of_its_own_contradict_each_other():
    with pytest.raises(ConfigurationError, match="Give either"):
        build_method("feather-flops", sparsity=0.9, budget=100.0, gamma=0.5, costs={"weight": 1.0})


def test_the_thresholds_of_asl_do_not_move_beyond_their_range():
    w = torch.randn(3, 50).unbind()
    tau, slope = StandardDeviations().thresholds(torch.tensor([-1.0, 2.0, 6.0]), LatentWeights(w))
    deviations = torch.stack([each.std() for each in w])
    torch.testing.assert_close(slope, deviations * torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(tau, deviations * torch.tensor([0.0, 2.0, 5.0]) + 1e-6)


@pytest.mark.parametrize("freeze", [3, 4, 8, 9])
def test_spartan_may_freeze_its_mask_from_the_target_to_the_end(freeze):
    model = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"sparsity": 0.5, "total_steps": 8, "end": 4, "freeze": freeze}
    if 4 <= freeze <= 8:
        feather.sparsify(model, optimizer, "spartan", **options)
        return
    with pytest.raises(ConfigurationError, match="end <= freeze"):
        feather.sparsify(model, optimizer, "spartan", **options)


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


@dataclass(frozen=True)
class TimesLatent:
    """A gradient rule that depends on the latent weight."""

    is_identity = False

    def __call__(self, gradient, latent, effective, progress):
        return gradient * latent


def test_a_gradient_rule_is_given_the_latent_weights():
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = replace(
        build_method("feather", sparsity=0.5, schedule="constant"), gradient=TimesLatent()
    )
    sparsifier = feather.sparsify(model, optimizer, method, sparsity=0.5, total_steps=2)
    latent = sparsifier.step.training.weights.views[0]
    before = latent.clone()
    (model(torch.ones(1, 8)).sum() / 10).backward()  # dL/du = 0.1
    optimizer.step()
    torch.testing.assert_close(latent, before * 0.9)


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


def test_the_thresholds_of_str_keep_their_ratio_when_their_sparsity_is_controlled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = feather.sparsify(model, optimizer, "str", sparsity=0.5, total_steps=4)
    method = sparsifier.step.training.method
    with torch.no_grad():
        method.r.copy_(torch.tensor([0.2, 0.6]).logit())
    model(torch.randn(4, 20)).square().mean().backward()
    optimizer.step()
    tau = method.r.detach().sigmoid()
    assert tau[1] / tau[0] == pytest.approx(3.0, rel=1e-3)
    assert not math.isclose(tau[0].item(), 0.2)


def test_the_penalty_of_asl_plus_is_the_slope_of_its_squared_logarithm():
    torch.manual_seed(0)
    normal, heavy = torch.randn(2, 50, dtype=torch.float64)
    weights = LatentWeights([normal, heavy**3])  # the model of the second one is a Laplace density
    kept, deviations = torch.tensor([10.0, 40.0]), torch.stack([w.std() for w in weights.views])
    r = torch.tensor([0.5, 1.2], dtype=torch.float64)
    now = Present(torch.zeros(2).bool(), deviations, lambda: kept, torch.tensor(0.8).double())
    violation = math.log(50 / 100 / (1 - now.sparsity.item()))
    ratios = torch.stack([w.abs().mean() for w in weights.views]) / deviations
    expected = 2 * 10.0 * violation * kept / 50 * log_density_slope(r, ratios)
    torch.testing.assert_close(FittedDeviations(10.0).penalty(r, weights, now), expected)


@pytest.mark.parametrize("name", ["feather", "asl", "asl+", "str", "gmp", "spartan"])
def test_which_methods_work_on_shards(name):
    model = nn.Linear(40, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(model, optimizer, name, sparsity=0.5, total_steps=8)
    assert sparsifier.step.training.method.facts.on_shards == (name != "spartan")


@pytest.mark.parametrize("step", [0, 100])
def test_probmask_draws_the_same_masks_on_a_device(step, monkeypatch):
    model = nn.Linear(40, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(model, optimizer, "probmask", sparsity=0.5, total_steps=100)
    training = sparsifier.step.training
    masks = []
    for on_device in (False, True):
        monkeypatch.setattr(devices, "synchronizes", lambda _, found=on_device: found)
        masks.append(training.method.update(training.weights, torch.tensor(step)).mask.flat)
    torch.testing.assert_close(*masks)


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

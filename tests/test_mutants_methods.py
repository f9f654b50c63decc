"""Parts of the methods: properties that a change of one line would break.

Each test was written for a change of the source that a mutation run made and did not notice; see
results/mutation.md.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import torch_feather as feather
from torch_feather import ConfigurationError, devices
from torch_feather.methods import build_method
from torch_feather.methods.learned.asl import StandardDeviations
from torch_feather.methods.learned.asl_plus import FittedDeviations, log_density_slope
from torch_feather.methods.learned.base import Present
from torch_feather.methods.own_parameters import Adam, Momentum
from torch_feather.methods.probmask.projection import project_
from torch_feather.methods.probmask.random_numbers import uniform
from torch_feather.weights.latent import LatentWeights


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


@pytest.mark.parametrize("values", [[3.0] * 10 + [0.1], [0.5, 1.0, 1.0], [5.0, 0.2, 0.2]])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_projection_meets_the_budget_also_if_most_values_exceed_one(
    values, on_device, monkeypatch
):
    monkeypatch.setattr(devices, "synchronizes", lambda _: on_device)
    x = torch.tensor(values, dtype=torch.float64)
    projected = project_(x.clone(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(float(projected.sum()), 1.0)
    inside = (projected > 0) & (projected < 1)
    shift = (x - projected)[inside]
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))


def test_probmask_may_finetune_no_step():
    assert build_method("probmask", sparsity=0.9, finetune=0.0).finetune == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_probmask_keeps_the_most_probable_weights(seed):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"sparsity": 0.5, "total_steps": 100, "seed": seed}
    training = feather.sparsify(model, optimizer, "probmask", **options).step.training
    probability = torch.tensor([0.5, 0.0, 1.0, 0.5, 0.5, 0.0, 1.0, 0.5])
    training.method.state["probability"].flat.copy_(probability)
    kept = training.method.update(training.weights, torch.tensor(100)).mask.flat
    assert int(kept.sum()) == 4
    assert kept[probability == 1].all()
    assert not kept[probability == 0].any()


@pytest.mark.parametrize("on_device", [False, True])
def test_random_numbers_are_those_of_splitmix64(on_device, monkeypatch):
    monkeypatch.setattr(devices, "synchronizes", lambda _: on_device)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of seed 0
    expected = [((x >> 41) + 0.5) / 2**23 for x in published]
    assert uniform(0, torch.tensor(0), 3, torch.float64).tolist() == expected


@pytest.mark.parametrize("name", ["feather", "asl"])
def test_the_effective_weights_after_the_last_step_are_the_same_on_a_device(name, monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = feather.sparsify(model, optimizer, name, sparsity=0.5, total_steps=8).step.training
    found = []
    for on_device in (False, True):
        monkeypatch.setattr(devices, "synchronizes", lambda _, found=on_device: found)
        out = torch.empty(30, 40)
        pruning = training.method.update(training.weights, torch.tensor(8))
        training.method.write_effective(training.weights, pruning, [out])
        found.append(out)
    assert int((found[0] == 0).sum()) == 600
    torch.testing.assert_close(*found)

"""Parts of the core alone: properties that a change of one line would break.

Each test was written for a change of the source that a mutation run made and did not notice; see
results/mutation.md.
"""

import math

import pytest
import torch
from torch import nn

import torch_feather as feather
from torch_feather import ConfigurationError, StateError
from torch_feather.methods import build_method
from torch_feather.methods.learned.asl import StandardDeviations
from torch_feather.methods.own_parameters import Adam, Momentum
from torch_feather.selection.device import select_device
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

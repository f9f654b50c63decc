"""Learned thresholds: gradients, learned sparsity, and steps."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import torch_feather as feather
from torch_feather import ConfigurationError, NonFiniteWeightError, StateError, devices
from torch_feather.methods import build_method
from torch_feather.methods.learned.asl_plus import log_density_slope
from torch_feather.schedules import Cubic

pytestmark = pytest.mark.filterwarnings("ignore:Every weight of")

STEPS = 200


class Task:
    """A network of 12,400 prunable weights that learns to imitate another."""

    def __init__(self, method: str, sparsity: float, optimizer: str = "sgd", **settings):
        torch.manual_seed(0)
        self.steps = settings.pop("total_steps", STEPS)
        dtype, lr = settings.pop("dtype", torch.float32), settings.pop("lr", 0.1)
        self.teacher = nn.Linear(20, 4).to(dtype)
        self.model = nn.Sequential(
            nn.Linear(20, 100), nn.BatchNorm1d(100), nn.ReLU(),
            nn.Linear(100, 100), nn.BatchNorm1d(100), nn.ReLU(),
            nn.Linear(100, 4),
        ).to(dtype)  # fmt: skip
        parameters = self.model.parameters()
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr, 0.9, weight_decay=5e-4)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr)
        self.sparsifier = feather.sparsify(
            self.model,
            self.optimizer,
            method,
            sparsity=sparsity,
            total_steps=self.steps,
            **settings,
        )
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 20, dtype=self.model[0].weight.dtype)
        return x, self.teacher(x).argmax(1)

    def gradients(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()

    def train(self, steps: int) -> "Task":
        for _ in range(steps):
            self.gradients(*self.batch())
            self.sparsifier.complete_gradients()
            learned = [*self.model.parameters(), *self.sparsifier.parameters()]
            nn.utils.clip_grad_norm_(learned, 3.0)
            self.optimizer.step()
            self.cosine.step()
        return self

    def threshold_gradients(self) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """d loss / d r on a fresh batch, and by name the latent weights w and dL/du."""
        x, y = self.batch()
        self.gradients(x, y)
        self.sparsifier.complete_gradients()
        [r] = self.sparsifier.parameters()
        latent = self.sparsifier.latent_weights()
        effective = {n: self.model.get_parameter(n).detach().requires_grad_() for n in latent}
        loss = F.cross_entropy(functional_call(self.model, effective, (x,)), y)
        gradients = torch.autograd.grad(loss, list(effective.values()))
        self.last = x, y
        return r.grad, latent, dict(zip(latent, gradients, strict=True))


# --- gradients of thresholds ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"decay": 1e-3, "s_init": -3.5}], ids=["control", "decay"])
def test_the_gradient_of_str_is_the_slope_of_the_loss(options):
    task = Task("str", 0.7, dtype=torch.float64, **options).train(60)
    [s] = task.sparsifier.parameters()
    s += 1e-7  # the control leaves one weight right at its threshold, where there is no slope
    task.sparsifier.load_state_dict(task.sparsifier.state_dict())
    found, latent, _ = task.threshold_gradients()
    x, y = task.last

    def loss(s: Tensor) -> Tensor:
        u = {n: w.sign() * (w.abs() - tau).relu()
             for (n, w), tau in zip(latent.items(), s.sigmoid(), strict=True)}  # fmt: skip
        return F.cross_entropy(functional_call(task.model, u, (x,)), y)

    # As small a step that no weight crosses its threshold.
    for i, e in enumerate(1e-9 * torch.eye(3, dtype=torch.float64)):
        slope = (loss(s + e) - loss(s - e)) / 2e-9
        assert float(found[i]) == pytest.approx(slope.item(), rel=1e-4, abs=1e-7)
    assert (found != 0).all()


@pytest.mark.parametrize(
    ("method", "theta"), [("asl", 1.0), ("asl+", 1.0), ("feather-asl+", 0.3), ("feather-asl+", 0.0)]
)
def test_the_gradient_of_multiples_of_the_spread(method, theta):
    """dL/dr = std (sum over kept of g (u - w) / tau, less theta times that of g w / tau)."""
    options = {"theta": theta} if "feather" in method else {}
    task = Task(
        method,
        0.7,
        dtype=torch.float64,
        dense_below=500,
        lr_multiplier=0.1,
        budget_weight=1.0,
        **options,
    ).train(60)
    # Without its weight the penalty is gone, and nothing else is.
    law = task.sparsifier.step.training.method.method.law
    object.__setattr__(law, "budget_weight", 0.0)
    found, latent, gradients = task.threshold_gradients()
    [r] = task.sparsifier.parameters()
    for i, (name, w) in enumerate(latent.items()):
        u, g = task.model.get_parameter(name).detach(), gradients[name]
        tau = r[i] * w.std() + 1e-6
        terms = torch.where(w.abs() > tau, g * (u - w) / tau, -theta * g * w / tau)
        expected = w.std() * terms.sum() if w.numel() >= 500 else torch.zeros(())
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-9, abs=1e-15)
    assert (found[:2] != 0).all() == (method != "asl" or theta > 0)


@pytest.mark.parametrize("method", ["asl", "asl+"])
def test_a_multiple_outside_of_its_range_gets_no_gradient_from_the_task(method):
    task = Task(method, 0.7, dense_below=0, budget_weight=0.0)
    [r] = task.sparsifier.parameters()
    r.copy_(torch.tensor([-0.1, 5.5, 1.0]))
    task.sparsifier.load_state_dict(task.sparsifier.state_dict())
    found, _, _ = task.threshold_gradients()
    assert (found != 0).tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["str", "feather-asl+"])
def test_gradients_of_small_thresholds_are_not_dominated_by_rounding(method, dtype):
    """u - w is less than the weights are rounded by; the network's gradients are what they are."""
    if method == "str":
        options = {"decay": 0.0, "s_init": -9.0}
    else:
        options = {"dense_below": 0, "budget_weight": 0.0}
    task = Task(method, 0.7, dtype=dtype, **options)
    if method == "feather-asl+":
        task.sparsifier.parameters()[0].fill_(0.005)
        task.sparsifier.load_state_dict(task.sparsifier.state_dict())
    task.gradients(*task.batch())
    task.sparsifier.complete_gradients()
    [r] = task.sparsifier.parameters()
    taus = task.sparsifier.thresholds().values()
    for i, ((name, w), tau) in enumerate(
        zip(task.sparsifier.latent_weights().items(), taus, strict=True)
    ):
        w, tau, p = w.double(), tau.double(), 1 if method == "str" else 3
        gradient = task.model.get_parameter(name).grad.double()
        change = feather.power_threshold(w, tau, p) - w
        slope = tau * (1 - tau) if method == "str" else w.std()
        expected = float((change * gradient).sum() / tau * slope)
        size = float((change * gradient).abs().sum() / tau * slope)
        assert float(r.grad[i]) == pytest.approx(expected, abs=1e-3 * size)


# --- the model behind the budget of ASL+ ----------------------------------------------------


def drawn(kind: str, n: int = 1_000_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "normal":
        return 0.03 * torch.randn(n, generator=generator)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return 0.03 * sign * torch.empty(n).exponential_(generator=generator)


@pytest.mark.parametrize("r", [0.2, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("kind", ["normal", "laplacian"])
def test_the_slope_of_the_density_is_that_of_the_weights(kind, r):
    """Each kind of weights is recognised, and measured a little to the left and right."""
    w = drawn(kind)
    multiples = w.abs() / w.std()
    width = 0.05
    left, right = ((multiples > r + d).double().mean() for d in (-width, width))
    [slope] = log_density_slope(torch.tensor([r]), (w.abs().mean() / w.std())[None])
    assert float(slope) == pytest.approx(float((right / left).log()) / (2 * width), rel=0.05)


# --- learned sparsity -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sparsity",
    [0.5, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.8, 0.9, 0.95, 0.98)), 0.99],
)
@pytest.mark.parametrize(
    ("optimizer", "lr"), [("sgd", 0.1), ("sgd", 0.003), ("sgd", 0.0), ("adamw", 1e-3)]
)
def test_str_learns_any_target_sparsity_with_any_optimizer(optimizer, lr, sparsity):
    """Within one weight in 10,000, rounding and its margin included."""
    task = Task("str", sparsity, optimizer, lr=lr).train(STEPS - 1)
    assert abs(task.sparsifier.learned_sparsity - sparsity) <= 1e-4
    task.train(1)
    assert abs(task.sparsifier.learned_sparsity - sparsity) <= 1e-4
    assert task.sparsifier.sparsity == round(sparsity * 12_400) / 12_400


def test_str_follows_its_schedule_at_every_step():
    task = Task("str", 0.98, begin=10, end=150)
    target = 0.98 * Cubic(10, 150).table(STEPS)
    own = [task.train(1).sparsifier.learned_sparsity for _ in range(STEPS)]
    assert (torch.tensor(own) - target[1:]).abs().max() <= 1.5e-4
    assert all(b >= a - 1.5e-4 for a, b in pairwise(own))


def test_str_controls_the_total_and_the_loss_decides_between_layers():
    task = Task("str", 0.9).train(STEPS)
    taus = [float(tau) for tau in task.sparsifier.thresholds().values()]
    assert max(taus) > 1.05 * min(taus)
    [s] = task.sparsifier.parameters()
    torch.testing.assert_close(s.sigmoid(), torch.tensor(taus), rtol=1e-4, atol=0)


def test_str_controls_half_precision_within_its_ties():
    task = Task("str", 0.9, dtype=torch.bfloat16).train(STEPS - 1)
    assert abs(task.sparsifier.learned_sparsity - 0.9) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.8, 0.95, 0.98])
@pytest.mark.parametrize("method", ["asl+", "feather-asl+"])
def test_asl_plus_learns_a_sparsity_near_its_target(method, sparsity):
    task = Task(method, sparsity, dense_below=0, total_steps=600).train(539)
    assert task.sparsifier.learned_sparsity == task.sparsifier.sparsity
    assert 1 - task.sparsifier.learned_sparsity == pytest.approx(1 - sparsity, rel=0.15)
    for _ in range(3):  # from a tenth before the end on the count is exact
        task.train(1)
        assert feather.sparsity(task.model) == round(sparsity * 12_400) / 12_400
    task.train(58)
    assert 1 - task.sparsifier.learned_sparsity == pytest.approx(1 - sparsity, rel=0.15)
    task.sparsifier.finalize()


def test_asl_plus_keeps_its_multiples_within_their_range():
    """A spike of the loss could move them so far that training cannot bring them back."""
    task = Task("feather-asl+", 0.9, dense_below=0).train(20)
    [r] = task.sparsifier.parameters()
    for kick, bound in ((1e6, 0.0), (-1e6, 5.0)):
        task.gradients(*task.batch())
        task.sparsifier.complete_gradients()
        r.grad.fill_(kick)
        task.optimizer.step()
        assert (r == bound).all()


@pytest.mark.parametrize("method", ["asl", "asl+", "str"])
def test_tied_weights_are_counted_exactly(method):
    """Half precision ties often."""
    options = {} if method == "str" else {"dense_below": 0}
    task = Task(method, 0.9, dtype=torch.bfloat16, **options).train(STEPS)
    assert task.sparsifier.sparsity == 0.9
    task.train(1)
    assert task.sparsifier.sparsity == 0.9


# --- non-finite values ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["asl", "asl+"])
def test_an_infinite_weight_makes_thresholds_infinite_and_is_an_error(method):
    task = Task(method, 0.9, dense_below=0).train(2)
    with torch.no_grad():
        task.model[3].weight[0, 0] = torch.inf
    task.optimizer.zero_grad()
    with pytest.raises(NonFiniteWeightError, match=r"thresholds of 3\.weight are not finite"):
        task.optimizer.step()


def test_an_infinite_weight_of_a_dense_layer_does_not_affect_thresholds():
    task, other = (Task("asl", 0.5, dense_below=10_000) for _ in range(2))
    with torch.no_grad():
        task.model[0].weight[0, 0] = torch.inf
    for one in (task, other):
        one.optimizer.param_groups[0]["weight_decay"] = 0.0
        for p in one.model.parameters():
            p.grad = torch.zeros_like(p)  # the penalty alone moves the thresholds
        [before] = (r.clone() for r in one.sparsifier.parameters())
        one.optimizer.step()
        assert one.sparsifier.parameters()[0][1] != before[1]
    assert task.model[0].weight[0, 0] == torch.inf
    assert (task.model[0].weight != 0).all()
    assert torch.equal(task.sparsifier.parameters()[0][1], other.sparsifier.parameters()[0][1])
    assert torch.equal(task.model[3].weight, other.model[3].weight)


@pytest.mark.parametrize("method", ["asl", "asl+", "feather-asl+", "str"])
def test_a_gradient_of_thresholds_that_is_nan_is_an_error(method):
    task = Task(method, 0.9, **({} if method == "str" else {"dense_below": 0})).train(2)
    task.gradients(*task.batch())
    task.sparsifier.complete_gradients()
    task.sparsifier.parameters()[0].grad[1] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=r"thresholds of 3\.weight are not finite"):
        task.optimizer.step()


def test_thresholds_that_are_nan_are_found_when_training_ends_on_a_device(monkeypatch):
    """Between two checks, which may be a hundred steps apart."""
    monkeypatch.setattr(devices, "synchronizes", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    task = Task("asl", 0.9, dense_below=0, total_steps=4).train(3)
    task.gradients(*task.batch())
    task.sparsifier.complete_gradients()
    task.sparsifier.parameters()[0].grad[1] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=r"3\.weight"):
        task.optimizer.step()


def test_finalize_raises_if_the_count_is_not_exact(monkeypatch):
    task = Task("asl", 0.9, dense_below=0, total_steps=4).train(4)
    method = task.sparsifier.step.training.method
    pruned = method.pruned

    def one_less(weights, pruning, i):
        mask = pruned(weights, pruning, i).clone()
        mask[tuple(mask.nonzero()[0])] = False
        return mask

    monkeypatch.setattr(method, "pruned", one_less)
    with (
        pytest.warns(feather.FeatherWarning, match="3 latent weights"),
        pytest.raises(StateError, match=r"means 11160 zeros among 12400 weights.*left 11157"),
    ):
        task.sparsifier.finalize()
    task.sparsifier.finalize(force=True)


# --- STR as published -----------------------------------------------------------------------


def test_decay_acts_on_s_once_and_as_in_sgd():
    """Where sigmoid(s) is 0 the loss has no gradient in s: there is decay alone."""
    task = Task("str", 0.5, decay=0.02, s_init=-3200.0, momentum=0.875, total_steps=40)
    s = nn.Parameter(torch.full((3,), -3200.0))
    sgd = torch.optim.SGD([s], 0.1, 0.875, weight_decay=0.02)
    for _ in range(30):
        sgd.param_groups[0]["lr"] = task.optimizer.param_groups[0]["lr"]
        s.grad = torch.zeros_like(s)
        sgd.step()
        task.train(1)
    [own] = task.sparsifier.parameters()
    torch.testing.assert_close(own, s.detach())
    assert task.sparsifier.learned_sparsity == 0


@pytest.mark.slow
def test_more_decay_is_more_sparsity_and_nothing_follows_the_target():
    own = [
        Task("str", 0.5, decay=decay, s_init=-8.0).train(STEPS - 1).sparsifier.learned_sparsity
        for decay in (0.0, 0.01, 0.03, 0.1)
    ]
    assert own == sorted(own)
    assert own[0] < 0.1 < 0.6 < own[-1]


def test_published_str_is_kept_if_training_stops_before_the_exact_count():
    task = Task("str", 0.5, decay=0.03, s_init=-8.0).train(STEPS - 1)
    own = task.sparsifier.learned_sparsity
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody modified the model
        task.sparsifier.finalize(force=True)
    assert feather.sparsity(task.model) == own != 0.5


def test_published_str_without_an_exact_count_ends_at_its_learned_sparsity():
    """The target counts as reached, and the report has the learned sparsity."""
    task = Task("str", 0.5, decay=0.03, s_init=-8.0, exact=False).train(STEPS - 1)
    assert not task.sparsifier.at_target
    sparsifier = task.train(1).sparsifier
    assert sparsifier.at_target
    own = sparsifier.learned_sparsity
    assert own == sparsifier.sparsity == sparsifier.report().learned_sparsity != 0.5
    assert feather.sparsity(sparsifier.finalize()) == sparsifier.report().sparsity == own


# --- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("str", {"decay": 1e-4, "end": 5}, "leave out decay"),
        ("str", {"decay": 1e-4, "schedule": "linear"}, "leave out decay"),
        ("str", {"decay": -1e-4}, "decay"),
        ("str", {"exact": False}, "decay="),
        ("str", {"s_init": math.nan}, "s_init"),
        ("str", {"momentum": 1.0}, "momentum"),
        ("str", {"schedule": "cubed"}, "'cubic'"),
        ("asl+", {"budget_weight": -1.0}, "budget_weight"),
        ("asl+", {"begin": 3, "schedule": Cubic()}, "begin"),
        ("feather-asl+", {"p": 0.5}, "p must be"),
        ("feather-asl+", {"theta": 2.0}, "theta"),
    ],
    ids=str,
)
def test_invalid_options_are_an_error(method, options, words):
    with pytest.raises(ConfigurationError, match=words):
        build_method(method, sparsity=0.9, **options)


def test_the_default_theta_of_feather_applies_to_its_learned_backbone():
    thetas = [
        build_method("feather-asl+", sparsity=s).gradient.theta for s in (0.9, 0.95, 0.951, 0.99)
    ]
    assert thetas == [1.0, 1.0, 0.5, 0.5]


# --- the budget of ASL ------------------------------------------------------------------------


class Groups(nn.Module):
    """Weights without groups: 144, 9216, 2304, 640."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)  # 288 weights
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)  # 576 weights
        self.head = nn.Linear(64, 10)


def budget_gradient(r: torch.Tensor, sizes: list[int], sparsity: float) -> torch.Tensor:
    """d/dr of 10 (D - (1 - s))^2, with D the density over these layers, by autograd."""
    r = r.clone().requires_grad_()
    n = torch.tensor(sizes, dtype=torch.float64)
    density = ((1 - torch.erf(r / math.sqrt(2))) * n).sum() / n.sum()
    (10 * (density - 1 + sparsity) ** 2).backward()
    return r.grad


@pytest.mark.parametrize("pruned", [["depthwise", "grouped"], ["depthwise"]], ids=str)
def test_asl_has_the_budget_of_its_public_code(pruned):
    """Small layers stay dense and do not count; groups do not make a layer small."""
    model = Groups().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    below = 1000 if len(pruned) == 2 else 5000
    sparsifier = feather.sparsify(
        model, optimizer, "asl", sparsity=0.1, total_steps=100, dense_below=below
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    [r] = sparsifier.parameters()
    with torch.no_grad():
        r.copy_(torch.tensor([0.1, 0.4, 0.7, 1.0]))
    sparsifier.complete_gradients()
    names = ["stem", "depthwise", "grouped", "head"]
    at = [names.index(name) for name in pruned]
    sizes = [model.get_submodule(name).weight.numel() for name in pruned]
    expected = torch.zeros(4, dtype=torch.float64)
    expected[at] = budget_gradient(r.detach()[at], sizes, 0.1)
    torch.testing.assert_close(r.grad, expected)
    # The thresholds prune these layers alone.
    optimizer.step()
    zeros = {name: bool((model.get_submodule(name).weight == 0).any()) for name in names}
    assert [name for name in names if zeros[name]] == pruned


def test_a_run_with_the_budget_of_version_0_1_keeps_it():
    """Its states have no entry that says which layers the budget counts."""

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 20))  # 1600 and 800 weights
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return (
            model,
            optimizer,
            feather.sparsify(model, optimizer, "asl", sparsity=0.6, total_steps=100),
        )

    model, optimizer, sparsifier = start()
    state = optimizer.state_dict()
    for own in state["state"].values():
        own.pop("feather_dense", None)
    optimizer.load_state_dict(state)
    [r] = sparsifier.parameters()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    sparsifier.complete_gradients()
    density = (1 - math.erf(float(r[0]) / math.sqrt(2))) * 1600 / 2400 + 800 / 2400
    slope = -math.sqrt(2 / math.pi) * math.exp(-(float(r[0]) ** 2) / 2) * 1600 / 2400
    assert float(r.grad[0]) == pytest.approx(20 * (density - 0.4) * slope, rel=1e-5)
    assert float(r.grad[1]) == 0
    again = start()[2]
    again.load_state_dict(sparsifier.state_dict())
    assert again.state_dict()["1.weight"]["dense"].view(torch.int64).tolist() == [1]
    assert start()[2].state_dict()["1.weight"]["dense"].view(torch.int64).tolist() == [2]


@pytest.mark.parametrize("method", ["asl", "str", "spartan", "probmask"])
def test_completion_uses_values_that_other_code_wrote(method):
    """Also if they are noticed after a first completion, which then is computed again."""
    found = []
    for noticed_before in (True, False):
        task = Task(method, 0.5).train(3)
        task.gradients(*task.batch())
        task.model[3].weight.data.mul_(1.5)  # no version counts it
        if noticed_before:
            task.sparsifier._training.absorb_external_writes()
        task.sparsifier.complete_gradients()
        learned = [*task.model.parameters(), *task.sparsifier.parameters()]
        found.append([p.grad for p in learned])
    assert all(map(torch.equal, *found))

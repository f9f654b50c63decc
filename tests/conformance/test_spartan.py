"""Spartan: soft top-k, derivative, frozen phase."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_feather as feather
from torch_feather import ConfigurationError, NonFiniteWeightError, StateError
from torch_feather.allocation import ERK, Allocation, FlopsBiased, Global, Uniform
from torch_feather.methods.spartan import gradient
from torch_feather.methods.spartan.logits import KeptLogits, sigmoid_
from torch_feather.methods.spartan.soft_top_k import SoftMasked, soft_top_k
from torch_feather.weights import plain, ranges
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.passes import pruned_mask
from torch_feather.weights.segments import position_of
from torch_feather.weights.sums import Recorded

from .harness import TOTAL, assert_exact, assert_same, snapshot, start
from .models import MODELS
from .test_trajectory import compare

FREEZE = 5
LATE = {"method": "spartan", "end": 3, "freeze": FREEZE}


# --- the soft top-k -------------------------------------------------------------------------

SAMPLES = {
    "normal": lambda n: torch.randn(n) * 0.05,
    "narrow": lambda n: torch.randn(n) * 1e-4,
    "wide": lambda n: torch.randn(n) * 30,
    "student": lambda n: 0.05 * torch.randn(n) / torch.randn(n),
    "mostly zeros": lambda n: torch.randn(n).sign() * torch.rand(n) ** 8,
    "two kinds": lambda n: torch.randn(n) * torch.where(torch.arange(n) % 100 == 0, 1, 1e-3),
    "two values": lambda n: torch.where(torch.arange(n) % 10 == 0, 0.5, 0.2),
    "one value": lambda n: torch.full((n,), 0.1),
}


def costs_of(sizes: list[int]) -> dict[str, float]:
    return {f"{i}.weight": 4.0**-i for i in range(len(sizes))}


def allocated(weights: LatentWeights, allocation: Allocation, sparsity: float):
    """Segments of an allocation, for weight tensors called 0.weight, 1.weight, ..."""
    names = [f"{i}.weight" for i in range(len(weights.views))]
    context = feather.context.MethodContext(nn.Module(), names, weights, sparsity, 10)
    fraction = torch.tensor(sparsity, dtype=torch.float64)
    fitted = allocation.fit(context)
    return fitted.cutoffs(weights, fraction, fitted.initial_state(context))


def soft_masks(weights: LatentWeights, segments, beta: float) -> list[Tensor]:
    soft = soft_top_k(weights, segments, torch.tensor(beta, dtype=torch.float64))
    positions = [position_of(weights, segments, i) for i in range(len(weights.views))]
    return [
        soft.mask(w.abs().to(weights.wide), j)
        for w, j in zip(weights.views, positions, strict=True)
    ]


ALLOCATIONS = {
    "global": Global(),
    "uniform": Uniform(),
    "erk": ERK(),
    "flops": FlopsBiased(1.0, costs=costs_of([1, 1, 1])),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_mask_costs_what_the_kept_weights_cost(allocation, dtype, sample):
    weights = LatentWeights(
        [SAMPLES[sample](n).view(shape).to(dtype) for n, shape in
         [(9000, (100, 90)), (2000, (50, 40)), (300, (300,))]]
    )  # fmt: skip
    cost = [1.0 if allocation != "flops" else 4.0**-i for i in range(3)]
    budgets = [[0], [1], [2]] if allocation in ("uniform", "erk") else [[0, 1, 2]]
    eps = torch.finfo(dtype).eps
    for sparsity, beta in product([0.001, 0.5, 0.95, 0.999], [1.5, 20.0, 1e4]):
        segments = allocated(weights, ALLOCATIONS[allocation], sparsity)
        masks = soft_masks(weights, segments, beta)
        kept = [~pruned_mask(weights, segments, i) for i in range(3)]
        for group in budgets:
            budget = sum(cost[i] * int(kept[i].sum()) for i in group)
            reached = sum(cost[i] * float(masks[i].double().sum()) for i in group)
            assert reached == pytest.approx(budget, rel=10 * eps, abs=0), (sparsity, beta)
        for m, keep in zip(masks, kept, strict=True):
            assert (m[keep] > 0).all()
            if keep.any() and not keep.all():  # the sigmoid rounds the same number in two ways
                assert m[keep].min() >= m[~keep].max() * (1 - 4 * eps)


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("beta", [1.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize("spread", [0.005, 0.05, 0.5])
def test_few_passes_over_the_weights_are_enough(spread, beta, sparsity, monkeypatch):
    passes = []
    sums = KeptLogits.sums
    monkeypatch.setattr(KeptLogits, "sums", lambda *args: passes.append(1) or sums(*args))
    weights = LatentWeights([torch.randn(100_000) * spread])
    soft_masks(weights, allocated(weights, Global(), sparsity), beta)
    assert len(passes) <= (3 if 0.1 < sparsity < 0.995 else 4)  # the sample has few of one kind


def test_the_shift_of_similar_weights_leaves_one_pass(monkeypatch):
    passes = []
    sums = KeptLogits.sums
    monkeypatch.setattr(KeptLogits, "sums", lambda *args: passes.append(1) or sums(*args))
    w, beta = torch.randn(300_000) * 0.05, torch.tensor(20.0, dtype=torch.float64)
    before, now = (LatentWeights([w + change * torch.randn_like(w)]) for change in (0.0, 1e-4))
    last = soft_top_k(before, allocated(before, Global(), 0.95), beta).shift
    segments = allocated(now, Global(), 0.95)
    expected = soft_top_k(now, segments, beta).shift
    passes.clear()
    found = soft_top_k(now, segments, beta, last).shift
    assert len(passes) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_search_begins_at_the_shift_that_continues_those_of_two_steps(monkeypatch):
    passes = []
    sums = KeptLogits.sums
    monkeypatch.setattr(KeptLogits, "sums", lambda *args: passes.append(1) or sums(*args))
    model = nn.Linear(400, 300, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    feather.sparsify(model, optimizer, "spartan", sparsity=0.9, total_steps=400, end=1)
    gradient = torch.randn(300, 400) * 1e-2
    for step in range(12):
        model.weight.grad = gradient.clone()
        passes.clear()
        optimizer.step()
        assert step < 4 or len(passes) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_mask_of_a_weight_does_not_depend_on_the_others(dtype):
    x = np.random.default_rng(0).normal(size=3001).astype(dtype) * 20
    whole = sigmoid_(x.copy())
    for size in (1, 7, 16, 33, 1000):
        parts = [sigmoid_(x[a : a + size].copy()) for a in range(0, x.size, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    np.testing.assert_allclose(whole, 1 / (1 + np.exp(-x.astype(np.longdouble))), rtol=4e-7)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_effective_weights_are_those_of_the_masks(allocation):
    """The pass that writes kept weights alone, and its definition on all weights."""
    tensors = [torch.randn(400, 300) * 0.05, torch.randn(70, 90) * 0.1, torch.randn(500)]
    tensors[1][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    weights = LatentWeights(tensors)
    segments = allocated(weights, ALLOCATIONS[allocation], 0.9)
    soft = soft_top_k(weights, segments, torch.tensor(20.0, dtype=torch.float64))
    out = Recorded([torch.full_like(w, 7.0) for w in weights.views])
    plain.write_effective(
        weights, segments, [SoftMasked(soft, j) for j in range(len(segments))], out
    )
    for i, (u, w) in enumerate(zip(out, weights.views, strict=True)):
        m = soft.mask(w.abs(), position_of(weights, segments, i))
        expected = torch.where(pruned_mask(weights, segments, i), 0.0, w * m)
        assert torch.equal(u.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(u.isnan(), w.isnan())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_infinite_sharpness_is_the_hard_mask(allocation):
    weights = LatentWeights([torch.randn(40, 30), torch.randn(20, 10), torch.randn(9)])
    segments = allocated(weights, ALLOCATIONS[allocation], 0.8)
    for i, m in enumerate(soft_masks(weights, segments, 1e9)):
        torch.testing.assert_close(m, (~pruned_mask(weights, segments, i)).float())


def test_zero_sharpness_is_one_constant():
    weights = LatentWeights([torch.randn(40, 30), torch.randn(20, 10)])
    for m in soft_masks(weights, allocated(weights, Global(), 0.8), 1e-9):
        torch.testing.assert_close(m, torch.full_like(m, 0.2))


@pytest.mark.parametrize("costs", [[1.0, 1.0], [3.0, 0.5]], ids=str)
def test_the_mask_is_the_fixed_point_of_sinkhorns_updates(costs):
    beta = 7.0
    tensors = [torch.randn(50, dtype=torch.float64), torch.randn(30, dtype=torch.float64)]
    weights = LatentWeights(tensors)
    names = {f"{i}.weight": cost for i, cost in enumerate(costs)}
    segments = allocated(weights, FlopsBiased(1.0, costs=names), 0.7)
    actual = torch.cat(soft_masks(weights, segments, beta))
    c = torch.cat([torch.full_like(w, 1 / float(s.scale)) for w, s in zip(tensors, segments,
                                                                         strict=True)])  # fmt: skip
    z = beta * torch.cat(tensors).abs() / c
    kept = torch.cat([~pruned_mask(weights, segments, i) for i in range(2)])
    mu = torch.zeros((), dtype=torch.float64)
    for _ in range(5000):
        nu = c.log() - F.softplus(z + mu)
        mu = (c * kept).sum().log() - torch.logsumexp(z + nu, 0)
    torch.testing.assert_close(torch.sigmoid(z + mu), actual, rtol=1e-9, atol=1e-9)


# --- the derivative -------------------------------------------------------------------------


def two_layers(dtype=torch.float64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(9, 7, bias=False, dtype=dtype), nn.Linear(7, 5, bias=False, dtype=dtype)
    )


def attached(allocation: Allocation, steps: int = 3, sparsity: float = 0.6):
    """A sparsifier before its target, after some steps that change no weight."""
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    sparsifier = feather.sparsify(
        model, optimizer, "spartan", sparsity=sparsity, total_steps=10, allocation=allocation,
        beta=9.0,
    )  # fmt: skip
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    optimizer.zero_grad()
    return model, sparsifier


def gradients(model: nn.Module, sparsifier, factors: list[Tensor]) -> list[Tensor]:
    """dL/dw for L = sum of factors u, so that dL/du are the factors."""
    sum((p * a).sum() for p, a in zip(model.parameters(), factors, strict=True)).backward()
    sparsifier.complete_gradients()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_gradient_is_that_of_finite_differences(allocation):
    model, sparsifier = attached(ALLOCATIONS[allocation])
    factors = [torch.randn_like(p) for p in model.parameters()]
    latent = [w.clone() for w in sparsifier.latent_weights().values()]
    beta = 1 + 8 * 3 / 8

    def loss(tensors: list[Tensor]) -> float:
        """Without the hard cutoff, which is straight-through."""
        weights = LatentWeights(tensors)
        segments = allocated(weights, ALLOCATIONS[allocation], 0.6)
        masks = soft_masks(weights, segments, beta)
        return sum(float((a * w * m).sum()) for a, w, m in zip(factors, tensors, masks,
                                                               strict=True))  # fmt: skip

    found = gradients(model, sparsifier, factors)
    step = 1e-6
    for i, w in enumerate(latent):
        for position in range(w.numel()):
            moved = [[t.clone() for t in latent] for _ in range(2)]
            moved[0][i].view(-1)[position] += step
            moved[1][i].view(-1)[position] -= step
            difference = (loss(moved[0]) - loss(moved[1])) / (2 * step)
            assert float(found[i].view(-1)[position]) == pytest.approx(
                difference, rel=1e-5, abs=1e-7
            )


def test_the_gradient_is_that_of_autograd_through_an_unrolled_solution():
    model, sparsifier = attached(Global())
    factors = [torch.randn_like(p) for p in model.parameters()]
    latent = [w.clone().requires_grad_() for w in sparsifier.latent_weights().values()]
    budget = sum(int(mask.sum()) for mask in sparsifier.masks().values())
    x = 4 * torch.cat([w.flatten() for w in latent]).abs()
    mu = torch.zeros((), dtype=torch.float64)
    for _ in range(20):
        m = torch.sigmoid(x + mu)
        mu = mu - (m.sum() - budget) / (m * (1 - m)).sum()
    u = torch.cat([w.flatten() for w in latent]) * torch.sigmoid(x + mu)
    (u * torch.cat([a.flatten() for a in factors])).sum().backward()
    for actual, w in zip(gradients(model, sparsifier, factors), latent, strict=True):
        torch.testing.assert_close(actual, w.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gradient_of_arrays_is_that_of_tensors(dtype, known, monkeypatch):
    """The form for a CPU, and the one for any device and type."""
    found = []
    for flat_arrays in (ranges.flat_arrays, lambda *_: None):
        monkeypatch.setattr(gradient, "flat_arrays", flat_arrays)
        torch.manual_seed(0)
        model = nn.Linear(300, 250, bias=False, dtype=dtype)  # more than one block
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        sparsifier = feather.sparsify(model, optimizer, "spartan", sparsity=0.9, total_steps=9)
        training = sparsifier.step.training
        for _ in range(4):
            (model.weight * torch.randn(250, 300, dtype=dtype)).sum().backward()
            if not known:  # as if other code had changed the weights meanwhile
                training.weights.views[0].add_(0)
            sparsifier.complete_gradients()
            found.append(model.weight.grad.clone())
            optimizer.step()
            optimizer.zero_grad()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    for a, b in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_budgets_of_layers_are_independent():
    model, sparsifier = attached(Uniform())
    factors = [torch.randn(7, 9).double(), torch.zeros(5, 7).double()]
    first, second = gradients(model, sparsifier, factors)
    assert (first != 0).all()
    assert (second == 0).all()


def test_the_common_budget_moves_weights_that_had_no_gradient():
    model, sparsifier = attached(Global())
    factors = [torch.randn(7, 9).double(), torch.zeros(5, 7).double()]
    _, second = gradients(model, sparsifier, factors)
    assert (second != 0).all()


def test_pruned_weights_have_gradients_until_the_mask_is_frozen():
    run = start("convnet", **LATE).train(0, FREEZE - 1)
    for step, frozen in [(FREEZE - 1, False), (FREEZE, True)]:
        run.train(step, step)
        run.loop.gradients(step)
        run.sparsifier.complete_gradients()
        masks = run.sparsifier.masks()
        for name, p in run.case.weights(run.model).items():
            assert bool((p.grad[~masks[name]] == 0).all()) == frozen
        run.optimizer.step()


def test_a_layer_without_gradients_keeps_its_weights():
    """Weights without a gradient get none and do not change."""
    run = start("convnet", **LATE).train(0, 2)
    run.model.stem.weight.requires_grad_(False)
    for p in run.model.parameters():
        p.grad = None
    before = run.sparsifier.latent_weights()
    run.train(2, TOTAL)
    after = run.sparsifier.latent_weights()
    assert torch.equal(after["stem.weight"], before["stem.weight"])
    assert not torch.equal(after["point.weight"], before["point.weight"])
    assert_exact(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_follow_the_autograd_form(dtype):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    compare("spartan-frozen", model="mlp", dtype=dtype, tolerance=tolerance)


# --- over time ------------------------------------------------------------------------------


def test_the_sparsity_rises_for_a_fifth_and_the_mask_stays_in_the_last():
    run = start("mlp", method="spartan", sparsity=0.5, total_steps=20)
    seen, masks = [], []
    for step in range(20):
        seen.append(run.zeros())
        latent = run.sparsifier.latent_weights()
        masks.append([p / latent[name] for name, p in run.case.weights(run.model).items()])
        run.train(step, step + 1)
    assert seen == [0, 15, 30, 45, *[60] * 16]
    for step in range(4, 20):
        same = all(map(torch.allclose, masks[step], masks[step - 1]))
        assert same == (step > 16), step
    assert all((m == 1).all() for m in masks[0])


def test_effective_weights_are_weights_times_the_mask_and_finalize_keeps_them():
    run = start("mlp", method="spartan").train(0, TOTAL)
    latent = run.sparsifier.latent_weights()
    for (name, p), m in zip(
        run.case.weights(run.model).items(), run.sparsifier.step.training.pruning.mask,
        strict=True,
    ):  # fmt: skip
        assert torch.equal(p, latent[name] * m)
        assert ((m > 0) == (p != 0)).all()
    before = copy.deepcopy(run.model.state_dict())
    assert_same(run.sparsifier.finalize().state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw-fused", "muon+adamw"])
def test_runs_resume_bitwise_before_and_after_the_mask_is_frozen(optimizer, dtype):
    whole = start("convnet", optimizer, dtype=dtype, **LATE)
    checkpoints = []
    for step in range(TOTAL):
        checkpoints.append(whole.save())
        whole.train(step, step + 1)
    end = snapshot(whole)
    for killed in range(1, TOTAL):
        run = start("convnet", optimizer, dtype=dtype, seed=1 + killed, **LATE)
        run.load(checkpoints[killed], ["model first", "optimizer first"][killed % 2])
        assert_same(snapshot(run.train(killed, TOTAL)), end)


def test_loading_an_earlier_state_unfreezes_the_mask():
    run = start("convnet", **LATE).train(0, 2)
    checkpoint = run.save()
    end = snapshot(run.train(2, TOTAL))
    assert_same(snapshot(run.load(checkpoint).train(2, TOTAL)), end)


def test_a_state_of_another_method_gets_a_mask_of_its_own():
    """A state of another method, saved after the freezing step, contains no mask."""
    other = start("convnet", method="feather").train(0, TOTAL - 1)
    run = start("convnet", seed=3, **LATE)
    with run.sparsifier.relaxed_loading():
        run.load(other.save())
    assert run.sparsifier.step_count == TOTAL - 1
    for step in (TOTAL - 1, TOTAL):
        assert_exact(run)
        assert run.zeros() == round(0.8 * 360)
        run.train(step, step + 1)


def test_a_state_without_its_mask_is_an_error():
    state = start(**LATE).train(0, FREEZE).sparsifier.state_dict()
    del state["2.weight"]["mask"]
    with pytest.raises(StateError, match=r"2\.weight.*no mask"):
        start(**LATE).sparsifier.load_state_dict(state)


@pytest.mark.parametrize("change", ["double", "channels_last"])
def test_a_frozen_mask_follows_the_weights(change):
    run = start("convnet", "sgd", **LATE).train(0, FREEZE + 1)
    before = run.sparsifier.masks()
    if change == "double":
        run.model.double()
        run.loop.dtype = torch.float64
    else:
        run.model.to(memory_format=torch.channels_last)
    for step in range(FREEZE + 1, TOTAL):
        run.train(step, step + 1)
        assert_same(run.sparsifier.masks(), before)
        assert_exact(run)


@pytest.mark.parametrize("stop", [FREEZE - 1, TOTAL])
def test_an_average_of_the_latents_has_the_exact_count(stop):
    run = start("convnet", **LATE)
    average = feather.LatentAverage(run.sparsifier, decay=0.5)
    for step in range(stop):
        run.train(step, step + 1)
        average.update()
    copied = average.copy_to(copy.deepcopy(run.model))
    assert run.case.zeros(copied) == round(0.8 * 360)
    if stop == TOTAL:  # the frozen mask is common to both
        for name, p in run.case.weights(copied).items():
            assert torch.equal(p != 0, run.sparsifier.masks()[name])


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "sigma"])
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.99])
def test_layers_may_be_kept_or_pruned_entirely(sparsity, allocation):
    run = start("convnet", method="spartan", sparsity=sparsity, allocation=allocation)
    for step in range(TOTAL):
        run.train(step, step + 1)
        assert all(p.isfinite().all() for p in run.model.parameters())
        assert_exact(run)
    assert run.zeros() == round(sparsity * 360)
    if sparsity == 0:
        assert_same(run.model.stem.weight.detach(),
                    run.sparsifier.latent_weights()["stem.weight"])  # fmt: skip


def test_nan_is_kept_and_raised():
    model = two_layers(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    feather.sparsify(model, optimizer, "spartan", sparsity=0.5, total_steps=4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[0].weight.grad[1, 2] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=r"0\.weight"):
        optimizer.step()
    assert model[0].weight[1, 2].isnan()


# --- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": float("inf")}, "beta"),
        ({"beta": "sharp"}, "beta"),
        ({"end": 6, "freeze": 5}, "end=6, freeze=5"),
        ({"freeze": 11}, "freeze=11"),
        ({"end": 0}, "begin before it ends"),
    ],
    ids=str,
)
def test_invalid_options_are_an_error(options, words):
    with pytest.raises(ConfigurationError, match=words):
        start(method="spartan", **options)


def test_a_sharpness_is_the_same_as_an_integer():
    state = start(beta=20, **LATE).train(0, 2).sparsifier.state_dict()
    start(beta=20.0, **LATE).sparsifier.load_state_dict(state)
    with pytest.raises(StateError, match="options"):
        start(beta=21, **LATE).sparsifier.load_state_dict(state)


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_runs_reach_their_target(total):
    run = start("mlp", method="spartan", total_steps=total).train(0, total)
    assert run.zeros() == 96
    run.sparsifier.finalize()


def test_expensive_layers_lose_more_weights():
    case = MODELS["convnet"]
    costs = {name: 1.0 for name in case.prunable} | {"stem.weight": 100.0}
    plain = start("convnet", method="spartan", sparsity=0.5).train(0, TOTAL)
    expensive = start(
        "convnet", method="spartan", sparsity=0.5, allocation=FlopsBiased(1.0, costs=costs)
    ).train(0, TOTAL)
    assert expensive.zeros() == plain.zeros() == 180
    assert int((expensive.model.stem.weight != 0).sum()) < int((plain.model.stem.weight != 0).sum())

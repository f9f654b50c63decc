"""Properties of single methods and allocations."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import torch_feather as feather
from torch_feather import ConfigurationError, StateError, devices
from torch_feather.allocation import ERK, FlopsBiased, Global
from torch_feather.allocation.base import round_counts
from torch_feather.allocation.uniform import FittedUniform
from torch_feather.context import MethodContext
from torch_feather.gradient_rules import StraightThrough
from torch_feather.methods import METHODS, Method, build_method, method_options
from torch_feather.methods.options import ALLOCATIONS
from torch_feather.operators import Hard, Soft
from torch_feather.schedules import Constant, Cubic, Stairs
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.passes import count_pruned, pruned_mask, write_effective
from torch_feather.weights.segments import Segment
from torch_feather.weights.selecting import select_weights

from .harness import STEPS, TOTAL, Loop, Run, assert_exact, assert_same, snapshot, start
from .models import MODELS
from .optimizers import OPTIMIZERS, as_list

ASL = {"method": "asl", "dense_below": 0, "lr_multiplier": 0.5}


def kept(model: nn.Module, names) -> list[int]:
    return [int((model.get_parameter(name) != 0).sum()) for name in names]


# --- allocations ----------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.8, 0.95])
def test_uniform_layers_are_equally_sparse_and_the_total_is_exact(sparsity):
    run = start(
        "convnet", method="gmp", sparsity=sparsity, allocation="uniform", schedule="constant"
    )
    sizes = list(run.case.prunable.values())
    for left, size in zip(kept(run.model, run.case.prunable), sizes, strict=True):
        assert abs(left - (1 - sparsity) * size) < 1
    assert run.zeros() == round(sparsity * sum(sizes))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("method", [m for m in METHODS if "allocation" in method_options(m)])
def test_every_method_takes_every_allocation_by_name_or_as_an_object(method, allocation):
    options = {"method": method, "sparsity": 0.15}
    named = start("convnet", allocation=allocation, **options).train(0, TOTAL // 2)
    given = start("convnet", allocation=ALLOCATIONS[allocation], **options).train(0, TOTAL // 2)
    assert named.zeros() == round(0.15 * 360)
    assert_same(snapshot(named)["masks"], snapshot(given)["masks"])


def test_other_methods_take_an_allocation_biased_by_costs():
    costs = {name: 3.0 + i for i, name in enumerate(MODELS["convnet"].prunable)}
    run = start("convnet", method="gmp", allocation=FlopsBiased(1.0, costs=costs))
    assert run.train(0, TOTAL).zeros() == round(0.8 * 360)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allocation": "erc"}, "'erc'.*'erk'"),
        ({"allocation": "flops"}, r"FlopsBiased\("),
        ({"allocation": 3}, "global, uniform"),
        ({"allocation": ERK}, "global, uniform"),
        ({"allocation": "erk", "min_density": 0.1}, "'erk'.*Leave them out"),
        ({"allocation": Global(0.1), "max_density": 0.9}, "Global object"),
    ],
    ids=str,
)
def test_an_invalid_allocation_is_an_error(options, words):
    with pytest.raises(ConfigurationError, match=words):
        build_method("feather", sparsity=0.8, **options)


def test_other_layers_compensate_for_a_dense_first_convolution():
    run = start("convnet", method="gmp", sparsity=0.3, schedule="constant")
    stem, *others = kept(run.model, run.case.prunable)
    assert stem == 216
    for left, size in zip(others, [72, 48, 24], strict=True):
        assert abs(left - size * (1 - 108 / 144)) < 1
    assert run.zeros() == 108


@pytest.mark.parametrize("method", ["gmp", "feather"])
def test_depthwise_convolutions_can_stay_dense(method):
    model = feather.models.mobilenet_v1(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, method, sparsity=0.9, total_steps=1, schedule="constant",
        allocation="uniform-dense-depthwise",
    )  # fmt: skip
    counts = {name: (~mask).double().mean().item() for name, mask in sparsifier.masks().items()}
    dense = {name for name in counts if "depthwise" in name} | {"stem.conv.weight"}
    assert len(dense) == 14
    assert {name for name, fraction in counts.items() if fraction == 0} == dense
    others = [fraction for name, fraction in counts.items() if name not in dense]
    assert max(others) - min(others) < 1e-3
    assert min(others) > 0.9  # they make up for it
    assert feather.sparsity(model) == pytest.approx(0.9, abs=1e-6)


def test_only_a_convolution_is_a_dense_first_convolution():
    """The weight of a bilinear layer has three dimensions, too."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Bilinear(5, 5, 8)
            self.conv = nn.Conv1d(4, 6, 3)
            self.head = nn.Linear(20, 10)

    for dense in ("conv.weight", None):
        net = Net()
        if dense is None:
            del net.conv
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        settings = {"sparsity": 0.5, "total_steps": 1, "schedule": "constant"}
        sparsifier = feather.sparsify(net, optimizer, "gmp", **settings)
        counts = {name: int((~mask).sum()) for name, mask in sparsifier.masks().items()}
        assert [name for name, count in counts.items() if count == 0] == ([dense] if dense else [])


def test_no_other_convolution_is_dense_if_the_first_is_excluded():
    model = MODELS["convnet"].make()
    first = next(name for name, p in model.named_parameters() if p.dim() > 2)
    run = start("convnet", method="gmp", sparsity=0.9, schedule="constant", exclude=first)
    assert len(run.sparsifier.masks()) > 1
    for mask in run.sparsifier.masks().values():
        assert (~mask).sum().item() == pytest.approx(0.9 * mask.numel(), abs=1)


def test_more_than_all_but_the_first_convolution_is_an_error():
    with pytest.raises(ConfigurationError, match="dense_first=False"):
        start("convnet", method="gmp", sparsity=0.8)


@pytest.mark.parametrize("method", ["gmp", "feather-gmp"])
def test_a_network_without_convolutions_has_no_dense_layer(method):
    run = start("mlp", method=method, sparsity=0.9, schedule="constant")
    assert sum(kept(run.model, run.case.prunable)) == 12


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_erk_densities_are_in_proportion_and_at_most_one(sparsity):
    method = Method(Hard(), StraightThrough(1.0), ERK(), Constant())
    run = start("convnet", method=method, sparsity=sparsity)
    shapes = [run.model.get_parameter(name).shape for name in run.case.prunable]
    densities = [k / s.numel() for k, s in zip(kept(run.model, run.case.prunable), shapes,
                                               strict=True)]  # fmt: skip
    factors = [d * s.numel() / sum(s) for d, s in zip(densities, shapes, strict=True)]
    limited = [f for f, d in zip(factors, densities, strict=True) if d < 1]
    rounding = [1 / sum(s) for s in shapes]
    assert all(abs(f - max(limited)) <= 2 * max(rounding) for f in limited)
    # Layers that are dense would have had more than they have weights.
    for f, d in zip(factors, densities, strict=True):
        assert d < 1 or not limited or f <= max(limited) + max(rounding)
    assert run.zeros() == round(sparsity * 360)


def test_whole_counts_sum_to_the_rounded_total_and_are_less_than_one_off():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        n = torch.randint(1, 50, (7,), generator=generator).double()
        amounts = n * torch.rand(7, generator=generator, dtype=torch.float64)
        counts = round_counts(amounts, amounts.sum())
        assert counts.sum() == amounts.sum().round()
        assert ((counts - amounts).abs() < 1).all()
        assert ((counts >= 0) & (counts <= n)).all()


@pytest.mark.parametrize("scale", [0.3, 1.7, 1e-3, 33.0])
@pytest.mark.parametrize("k", [1, 500, 3000])
def test_no_kept_weight_changes_its_sign_at_a_scaled_cutoff(scale, k):
    """The threshold is divided by the scale, and rounding must not raise it above a kept weight."""
    weights = [torch.randn(60, 50), (torch.randint(-9, 10, (50, 20)) + 0.5) / 7]
    model = nn.Sequential(nn.Linear(50, 60, bias=False), nn.Linear(20, 50, bias=False))
    for layer, w in zip(model, weights, strict=True):
        layer.weight.data.copy_(w)
    costs = {"0.weight": 1.0, "1.weight": scale}
    method = Method(Soft(), StraightThrough(1.0), FlopsBiased(1.0, costs=costs), Constant())
    sparsifier = feather.sparsify(
        model, torch.optim.SGD(model.parameters(), 0.1), method, sparsity=k / 4000, total_steps=1
    )
    masks = sparsifier.masks()
    assert sum(int((~mask).sum()) for mask in masks.values()) == k
    for (name, mask), w in zip(masks.items(), weights, strict=True):
        u = model.get_parameter(name).detach()
        assert torch.equal(u.sign(), torch.where(mask, w.sign(), 0))
        assert (w.abs()[mask] > sparsifier.thresholds()[name]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_threshold_of_scaled_magnitudes_is_below_every_kept_one(dtype):
    """Among ties and neighbouring floats too.

    The cutoff between two ties is one float below their score. Divided by the scale it may round up
    to the magnitude of the kept one: most often if the score has a large mantissa, and the
    magnitude a small one.
    """
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    ranges = [(1.0, 0.1, 1.7, 0.25), (0.1, 3.0, 0.1, 3.0)]
    for first, scale in (
        (a + b * x, c + d * y)
        for a, b, c, d in ranges
        for x, y in torch.rand(25, 2, dtype=dtype).unbind()
    ):
        w = (first.view(integer) + torch.arange(12, dtype=integer) // 2).view(dtype)
        weights = LatentWeights([w])
        for k in range(1, 12):
            cutoff = select_weights(weights, torch.tensor(k), [scale])
            segment = Segment(0, 12, cutoff, scale)
            kept = ~pruned_mask(weights, [segment], 0)
            assert int(kept.sum()) == 12 - k
            assert (w[kept] > segment.threshold).all()
            u = torch.empty_like(w)
            write_effective(weights, [segment], Soft(), [u])
            assert torch.equal(u > 0, kept)


def test_no_bias_is_the_global_ranking():
    costs = {name: 3.0 + i for i, name in enumerate(MODELS["convnet"].prunable)}
    plain = start("convnet").train(0, STEPS)
    biased = start("convnet", method="feather-flops", gamma=0.0, costs=costs).train(0, STEPS)
    for p, q in zip(plain.model.parameters(), biased.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert torch.equal(p == 0, q == 0)


def test_costs_are_counted_from_an_example_input():
    x = MODELS["convnet"].batch(0)[0]
    counted = start("convnet", method="feather-flops", gamma=1.0, example_input=lambda _: x)
    flops = feather.count_flops(MODELS["convnet"].make(), x)
    costs = {layer.name: layer.dense / math.prod(layer.weight_shape) for layer in flops.layers}
    assert costs["stem.weight"] == 36
    given = start("convnet", method="feather-flops", gamma=1.0, costs=costs)
    assert_same(
        snapshot(counted.train(0, STEPS))["masks"], snapshot(given.train(0, STEPS))["masks"]
    )


def test_a_tied_weight_costs_the_sum_of_its_uses():
    x = MODELS["tied"].batch(0)[0]
    counted = start("tied", method="feather-flops", gamma=1.0, example_input=lambda _: x)
    costs = {"first.weight": 2.0, "head.weight": 1.0}
    given = start("tied", method="feather-flops", gamma=1.0, costs=costs)
    assert_same(
        snapshot(counted.train(0, STEPS))["masks"], snapshot(given.train(0, STEPS))["masks"]
    )


def macs(run: Run) -> int:
    return feather.count_flops(run.model, run.case.batch(0)[0]).sparse


def test_a_bias_is_found_for_a_budget_and_survives_a_restart():
    x = MODELS["convnet"].batch(0)[0]
    settings = {"method": "feather-flops", "schedule": "constant", "example_input": lambda _: x}
    plain = macs(start("convnet", schedule="constant"))
    budget = 0.5 * plain
    run = start("convnet", budget=budget, **settings)
    assert 0.8 * budget <= macs(run) <= budget
    assert run.zeros() == round(0.8 * 360)
    loose = start("convnet", budget=2.0 * plain, **settings)
    assert macs(loose) == plain
    run.train(0, 3)
    # Another seed would find another bias.
    resumed = start("convnet", seed=5, budget=budget, **settings).load(run.save())
    assert_same(snapshot(resumed.train(3, 6)), snapshot(run.train(3, 6)))


@pytest.mark.parametrize("pattern", [None, "2x1"])
@pytest.mark.parametrize("way", ["host", "device"])
def test_the_budget_holds_in_training(way, pattern, monkeypatch):
    """Also if the host reads nothing; a block counts with all its weights."""
    if way == "device":
        monkeypatch.setattr(devices, "synchronizes", lambda device: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = MODELS["convnet"].batch(0)[0]
    budget = 0.5 * macs(start("convnet", schedule="constant"))
    biased = FlopsBiased(budget=budget, example_input=x)
    run = start("convnet", method="feather", allocation=biased, pattern=pattern, total_steps=40)
    found = run.sparsifier.step.training.method.state["gamma"].flat
    before = found.clone()
    run.train(0, 19)
    assert run.sparsifier.step_count + 1 == run.sparsifier.target_step
    for step in range(19, 40):
        run.train(step, step + 1)
        assert 0.5 * budget <= macs(run) <= budget, step
    assert (found == found[0]).all()
    assert (found - before).abs().max() > 0.05
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*budget")
        run.sparsifier.finalize()


def test_an_unmet_budget_gives_a_warning():
    """As when other weights were written after the last step."""
    options = {"method": "feather-flops", "costs": {"0.weight": 5.0, "2.weight": 1.0}}
    run = start("mlp", budget=60.0, **options).train(0, TOTAL)
    with torch.no_grad():
        run.model[2].weight.zero_()
    with pytest.warns(feather.FeatherWarning, match="its weights cost 1.., more than .* of 60"):
        run.sparsifier.finalize()


@pytest.mark.parametrize("gamma", [3.0, 32.0, 1e6])
def test_a_strong_bias_prunes_expensive_layers_first_and_by_magnitude(gamma):
    """Also if the formula would overflow."""
    tensors = [torch.randn(n) for n in (700, 200, 100)]
    costs = {"expensive": 12544.0, "fair": 784.0, "cheap": 1.0}
    weights = LatentWeights(tensors)
    context = MethodContext(nn.Module(), list(costs), weights, 0.95, 10)
    fitted = FlopsBiased(gamma, costs=costs).fit(context)
    sparsity = torch.tensor(0.95, dtype=torch.float64)
    segments = fitted.cutoffs(weights, sparsity, fitted.initial_state(context))
    assert count_pruned(weights, segments).tolist() == [700, 200, 50]
    pruned = pruned_mask(weights, segments, 2)
    assert tensors[2].abs()[pruned].max() < tensors[2].abs()[~pruned].min()


def test_costs_that_were_counted_survive_a_restart_with_another_input():
    """Costs belong to the run: images of another size would give other costs."""
    x = MODELS["convnet"].batch(0)[0]
    options = {"method": "feather-flops", "gamma": 0.5}
    run = start("convnet", example_input=lambda _: x, **options).train(0, 3)
    small = nn.functional.interpolate(x, size=4)
    resumed = start("convnet", example_input=lambda _: small, **options).load(run.save())
    assert_same(snapshot(resumed.train(3, 6)), snapshot(run.train(3, 6)))


def test_costs_that_were_given_survive_a_restart():
    costs = {name: 3.0 ** (i + 1) for i, name in enumerate(MODELS["convnet"].prunable)}
    run = start("convnet", method="feather-flops", gamma=0.5, costs=costs).train(0, 3)
    # Times that are measured again are others.
    measured = {name: cost ** (1 + i % 2) for i, (name, cost) in enumerate(costs.items())}
    resumed = start("convnet", method="feather-flops", gamma=0.5, costs=measured).load(run.save())
    assert_same(snapshot(resumed.train(3, 6)), snapshot(run.train(3, 6)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "example_input"),
        ({"gamma": 1.0, "budget": 5.0}, "either"),
        ({"gamma": 0.25, "budget": 5.0}, "either"),  # also if it is what is used without a budget
        ({"gamma": 1.0}, "example_input"),
        ({"gamma": -1.0, "costs": {}}, "gamma"),
        ({"gamma": 1.0, "costs": "seconds"}, "map weight names to numbers"),
        ({"gamma": 1.0, "costs": {"0.weigth": 1.0, "head": 1.0}}, r"0\.weight.*0\.weigth"),
        ({"gamma": 1.0, "costs": {"0.weight": 0.0, "2.weight": 1.0}}, r"0\.weight"),
        ({"budget": 1.0, "costs": {"0.weight": 5.0, "2.weight": 1.0}}, "Raise the budget"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_options_of_a_bias_are_an_error(options, words):
    with pytest.raises(ConfigurationError, match=words):
        start("mlp", method="feather-flops", **options)


# --- schedules of GMP -----------------------------------------------------------------------


@pytest.mark.parametrize("total", [7, 10, 100])
@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("begin", [0, 4])
def test_stairs_rise_at_multiples_and_reach_the_target_on_time(begin, every, total):
    smooth = Cubic(begin, total).table(total)
    stairs = Stairs(Cubic(begin, total), every).table(total)
    assert stairs[-1] == 1
    assert (stairs[:-1] <= smooth[:-1]).all()
    rises = (stairs.diff() > 0).nonzero().flatten() + 1
    expected = {*range(begin + every, total, every), total}
    assert set(rises.tolist()) == expected


def test_stairs_without_steps_are_an_error():
    with pytest.raises(ConfigurationError, match="every"):
        start(method="gmp", every=0)


# --- learned thresholds ---------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_learned_thresholds_end_with_the_exact_count(model):
    run = start(model, **ASL)
    target_step = run.sparsifier.target_step
    assert target_step == math.ceil(0.9 * TOTAL)
    run.train(0, target_step - 1)
    assert run.zeros() != round(0.8 * run.case.size)
    assert_exact(run)
    assert run.sparsifier.learned_sparsity == run.sparsifier.sparsity
    run.train(target_step - 1, target_step)
    for step in range(target_step, TOTAL + 3):
        assert_exact(run)
        assert run.zeros() == round(0.8 * run.case.size)
        run.train(step, step + 1)
    own, report = run.sparsifier.learned_sparsity, run.sparsifier.report()
    assert own == report.to_dict()["learned_sparsity"] != run.sparsifier.sparsity
    assert f"Without the final exact-count pruning the method prunes {100 * own:.2f} %" in str(
        report
    )
    run.sparsifier.finalize()
    assert run.sparsifier.learned_sparsity == own
    assert run.zeros() == round(0.8 * run.case.size)


def test_the_exact_count_is_that_of_the_largest_multiples_of_the_thresholds():
    run = start("convnet", **ASL).train(0, TOTAL)
    latent = run.sparsifier.latent_weights()
    [r] = run.sparsifier.parameters()
    scores = torch.cat([
        (w.abs() / (r[i].clamp(0, 5) * w.std() + 1e-6)).flatten()
        for i, w in enumerate(latent.values())
    ])  # fmt: skip
    mask = torch.cat([mask.flatten() for mask in run.sparsifier.masks().values()])
    assert scores[~mask].max() <= scores[mask].min()


@pytest.mark.parametrize("method", ["asl+", "feather-asl+"])
@pytest.mark.parametrize(
    ("schedule", "target_step"),
    [
        ({"schedule": "linear", "end": 10}, 10),
        ({"schedule": "one-shot", "begin": 10}, 10),
        ({"end": 9}, 9),
        ({"end": 4}, 9),
    ],
    ids=str,
)
def test_the_target_is_reached_no_earlier_than_the_schedule_ends(schedule, target_step, method):
    run = start(method=method, dense_below=0, **schedule)
    for step in range(TOTAL + 1):
        assert run.sparsifier.at_target == (step >= target_step)
        if step < target_step:
            with pytest.raises(StateError, match="Continue training"):
                run.sparsifier.finalize()
        else:
            assert run.zeros() == 96
        run.train(step, step + 1)


def test_finalize_before_the_exact_count_is_an_error_unless_forced():
    run = start(**ASL)
    run.train(0, run.sparsifier.target_step - 1)
    zeros = run.zeros()
    with pytest.raises(StateError, match=r"0\.8.*force=True"):
        run.sparsifier.finalize()
    run.sparsifier.finalize(force=True)
    assert run.zeros() == zeros


def test_small_layers_stay_dense():
    run = start("convnet", method="asl", dense_below=60, lr_multiplier=0.5).train(0, TOTAL)
    assert kept(run.model, run.case.prunable)[2:] == [48, 24]
    assert run.zeros() == 288
    with pytest.raises(ConfigurationError, match="dense_below=1000"):
        start("convnet", method="asl")


def test_gradients_of_learned_thresholds_can_be_completed_early_and_once():
    early, late = (start("convnet", **ASL) for _ in range(2))
    for step in range(3):
        early.loop.gradients(step)
        for _ in range(2):
            early.sparsifier.complete_gradients()
            [r] = early.sparsifier.parameters()
            assert r.grad is not None
        early.optimizer.step()
        late.loop.step(step)
    assert_same(snapshot(early), snapshot(late))
    assert all(p.grad is None for p in early.sparsifier.parameters())


def test_completed_gradients_that_are_dropped_have_no_effect():
    """As when GradScaler skips a step after unscaling and clipping."""
    run, other = (start("mlp", **ASL).train(0, 2) for _ in range(2))
    run.loop.gradients(7)
    run.sparsifier.complete_gradients()
    run.sparsifier.parameters()[0].grad.fill_(torch.nan)
    assert_same(snapshot(run.train(2, 5)), snapshot(other.train(2, 5)))


def test_learned_thresholds_follow_the_learning_rate_of_the_user():
    run = start("convnet", **ASL).train(0, 2)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    [before] = copy.deepcopy(run.sparsifier.parameters())
    run.train(2, 3)
    assert torch.equal(run.sparsifier.parameters()[0], before)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.1
    run.train(3, 4)
    assert not torch.equal(run.sparsifier.parameters()[0], before)


def test_own_parameters_are_in_no_optimizer_and_end_with_finalize():
    run = start("convnet", **ASL).train(0, TOTAL)
    own = run.sparsifier.parameters()
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert not any(p is q for p in own for q in held)
    run.sparsifier.finalize()
    assert run.sparsifier.parameters() == []
    run.sparsifier.complete_gradients()
    assert not any("feather" in k for e in run.optimizer.state_dict()["state"].values() for k in e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "muon+adamw"])
def test_learned_thresholds_are_restored_bitwise_also_if_loaded_before_sparsify(optimizer, dtype):
    """torch casts every loaded entry to the type of its parameter."""
    whole = start("convnet", optimizer, dtype=dtype, **ASL).train(0, 4)
    checkpoint = whole.save()
    end = snapshot(whole.train(4, STEPS))
    resumed = start("convnet", optimizer, dtype=dtype, seed=3, **ASL).load(checkpoint)
    assert_same(snapshot(resumed.train(4, STEPS)), end)
    case = MODELS["convnet"]
    net = case.make(7, dtype)
    made = OPTIMIZERS[optimizer](net)
    late = Run(net, made, None, Loop(net, net, made, case, dtype=dtype), case).load(checkpoint)
    late.sparsifier = feather.sparsify(net, made, sparsity=0.8, total_steps=TOTAL, **ASL)
    assert len(as_list(made)) in (1, 2)
    assert_same(snapshot(late.train(4, STEPS)), end)


def test_a_state_without_own_parameters_is_an_error():
    state = start(**ASL).train(0, 2).sparsifier.state_dict()
    del state["2.weight"]["deviations"]
    run = start(**ASL).train(0, 3)
    before = snapshot(run)
    with pytest.raises(StateError, match=r"2\.weight.*no deviations"):
        run.sparsifier.load_state_dict(state)
    assert_same(before, snapshot(run))


def test_casting_keeps_learned_thresholds():
    run = start("mlp", "sgd", **ASL).train(0, 3)
    [before] = copy.deepcopy(run.sparsifier.parameters())
    run.model.double()
    run.loop.dtype = torch.float64
    run.sparsifier.attachment.sync()
    assert torch.equal(run.sparsifier.parameters()[0], before.double())
    run.train(3, TOTAL)
    assert_exact(run)
    assert run.zeros() == 96


def test_an_average_of_the_latents_uses_the_learned_thresholds():
    run = start("convnet", **ASL)
    average = feather.LatentAverage(run.sparsifier, decay=0.5)
    for step in range(TOTAL):
        run.train(step, step + 1)
        average.update()
    copied = average.copy_to(copy.deepcopy(run.model))
    assert run.case.zeros(copied) == round(0.8 * 360)


def test_a_step_of_thresholds_without_a_learning_rate_is_an_error():
    run = start("mlp", "sgd", **ASL)
    run.loop.gradients(0)
    run.sparsifier.complete_gradients()
    step, training = torch.zeros((), dtype=torch.int64), run.sparsifier.step.training
    with pytest.raises(ConfigurationError, match="no learning rate"):
        training.method.after_step(
            training.weights, training.pruning, training.binding.gradients, step, None, True
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_multiplier": -1.0}, "lr_multiplier=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"budget_weight": math.nan}, "budget_weight"),
    ],
    ids=str,
)
def test_invalid_options_of_learned_thresholds_are_an_error(options, words):
    with pytest.raises(ConfigurationError, match=words):
        build_method("asl", sparsity=0.9, **options)


def test_the_budget_pulls_towards_the_target():
    """Without a loss, the penalty alone brings normal weights to their density."""
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 50, bias=False))
    for layer in model:
        nn.init.normal_(layer.weight, std=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = feather.sparsify(
        model,
        optimizer,
        "asl",
        sparsity=0.9,
        total_steps=500,
        lr_multiplier=0.2,
        momentum=0.0,
    )
    for _ in range(300):
        optimizer.zero_grad()
        for layer in model:
            layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    assert sparsifier.learned_sparsity == pytest.approx(0.9, abs=0.01)


# --- ST-3 -----------------------------------------------------------------------------------


def test_st3_restores_the_mean_magnitude_of_each_channel_in_part():
    run = start("convnet", method="st3", sparsity=0.5, schedule="constant")
    tau = run.sparsifier.thresholds()["stem.weight"]
    w = run.sparsifier.latent_weights()["stem.weight"]
    u = run.model.stem.weight.detach()
    for o in range(len(w)):
        r = (w[o].abs()[u[o] != 0].sum() / 27 + 1e-6) / (w[o].abs().mean() + 1e-6)
        expected = 1.01 / (r + 0.01) * (w[o].abs() - tau).clamp(min=0) * w[o].sign()
        torch.testing.assert_close(u[o], expected)


@pytest.mark.parametrize(
    ("layer", "outputs_first"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), lambda w: w),
        (nn.ConvTranspose2d(4, 6, 3), lambda w: w.transpose(0, 1)),
        (
            nn.ConvTranspose1d(4, 6, 3, groups=2),
            lambda w: torch.cat([part.transpose(0, 1) for part in w.chunk(2)]),
        ),
        (Conv1D(6, 4), lambda w: w.T),
    ],
    ids=["convolution", "transposed", "transposed, in groups", "Conv1D"],
)
def test_st3_scales_output_channels_wherever_a_layer_has_them(layer, outputs_first):
    layer = copy.deepcopy(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        layer, optimizer, "st3", sparsity=0.5, total_steps=1, schedule="constant"
    )
    tau = sparsifier.thresholds()["weight"]
    w, u = outputs_first(sparsifier.latent_weights()["weight"]), outputs_first(layer.weight)
    assert len(w) == 6
    for o in range(6):
        r = (w[o].abs() * (u[o] != 0)).mean() / w[o].abs().mean()
        expected = 1.01 / (r + 0.01) * (w[o].abs() - tau).clamp(min=0) * w[o].sign()
        torch.testing.assert_close(u[o].detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 6, 3), Conv1D(6, 4)], ids=["t", "Conv1D"])
def test_st3_finds_the_type_of_a_compiled_layer(layer):
    weights = []
    for compiled in (False, True):
        model = nn.Sequential(copy.deepcopy(layer))
        if compiled:
            model[0] = torch.compile(model[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"sparsity": 0.5, "total_steps": 1, "schedule": "constant"}
        feather.sparsify(model, optimizer, "st3", **settings)
        weights.append(model[0].weight)
    assert torch.equal(*weights)


def test_st3_keeps_nan_and_the_exact_count():
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, "st3", sparsity=0.5, total_steps=1, schedule="constant")
    model.weight.grad = torch.zeros_like(model.weight)
    model.weight.grad[1, 2] = torch.nan
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert int((model.weight == 0).sum()) == 16
    assert int(model.weight.isnan().sum()) == 1


def test_sigma_ranks_by_the_shape():
    run = start("convnet", method="st3-sigma", schedule="constant")
    scores = torch.cat([
        (w.abs() * math.sqrt(sum(w.shape))).flatten()
        for w in run.sparsifier.latent_weights().values()
    ])  # fmt: skip
    mask = torch.cat([mask.flatten() for mask in run.sparsifier.masks().values()])
    assert scores[~mask].max() <= scores[mask].min()


def test_averages_share_the_constants_of_the_layout():
    weights = LatentWeights([torch.randn(3, 4), torch.randn(5)])
    uniform = FittedUniform([12, 5])
    fraction = torch.tensor(0.5, dtype=torch.float64)
    for one in (weights, weights.like([weights.flats[0].clone()])):
        assert count_pruned(one, uniform.cutoffs(one, fraction)).tolist() == [6, 2]


# --- states of other methods ----------------------------------------------------------------

COSTS = {name: 3.0 ** (i + 1) for i, name in enumerate(MODELS["convnet"].prunable)}
MLP_COSTS = {"0.weight": 3.0, "2.weight": 1.0}
BIASED = {"method": "feather-flops", "costs": COSTS}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (ASL, {"method": "str"}),
        ({"method": "str"}, ASL),
        ({"method": "spartan"}, ASL),
        ({"method": "st3-sigma"}, {"gamma": 2.0, **BIASED}),
        ({"gamma": 2.0, **BIASED}, {"method": "st3-sigma"}),
        ({"gamma": 2.0, **BIASED}, {"gamma": 0.5, **BIASED}),
    ],
    ids=lambda options: options["method"],
)
def test_learned_state_of_another_method_is_not_used(before, now):
    run, fresh = start("convnet", **now), start("convnet", **now)
    with run.sparsifier.relaxed_loading():
        run.load(start("convnet", **before).train(0, 5).save())
    for mine, own in zip(run.sparsifier.parameters(), fresh.sparsifier.parameters(), strict=True):
        assert torch.equal(mine, own)
    # Equal latent weights after equal steps have equal thresholds.
    fresh.sparsifier.step.training.weights.flats[0].copy_(
        run.sparsifier.step.training.weights.flats[0]
    )
    fresh.sparsifier.step.training.count.copy_(run.sparsifier.step.training.count)
    fresh.sparsifier.step.training.write_effective()
    assert_same(run.sparsifier.thresholds(), fresh.sparsifier.thresholds())


def test_learned_state_is_loaded_into_a_longer_run():
    short = start("convnet", **ASL).train(0, 5)
    run = start("convnet", total_steps=2 * TOTAL, **ASL)
    with run.sparsifier.relaxed_loading():
        run.load(short.save())
    assert_same(run.sparsifier.parameters(), short.sparsifier.parameters())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["asl", "asl+", "feather-asl+"])
def test_learned_thresholds_work_for_a_layer_of_one_weight(method):
    model = nn.Sequential(nn.Linear(9, 1, bias=False), nn.Linear(1, 1), nn.Linear(1, 9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, method, sparsity=0.5, total_steps=3, dense_below=0
    )
    for _ in range(3):
        model(torch.randn(4, 9)).square().mean().backward()
        optimizer.step()
    sparsifier.finalize()
    assert sum(int((layer.weight == 0).sum()) for layer in model) == round(0.5 * 19)


@pytest.mark.parametrize("method", ["asl", "feather-flops", "probmask", "spartan", "str"])
def test_a_cast_model_resumes_bitwise(method):
    options = {"asl": ASL, "feather-flops": {"budget": 40.0, "costs": MLP_COSTS}}.get(method, {})
    options = {"method": method, **options}
    run = start("mlp", "sgd", **options).train(0, 9)
    run.model.double()
    run.loop.dtype = torch.float64
    other = start("mlp", "sgd", dtype=torch.float64, seed=3, **options).load(run.save())
    assert_same(snapshot(other.train(9, TOTAL)), snapshot(run.train(9, TOTAL)))

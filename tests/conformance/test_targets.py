"""Targets per group of weights, or as a fraction of all parameters."""

import re
import warnings

import pytest
import torch
from torch import nn

import torch_feather as feather
from torch_feather import ConfigurationError
from torch_feather.allocation import FlopsBiased, Global
from torch_feather.methods import METHODS, method_options
from torch_feather.methods.options import ALLOCATIONS

from . import methods, test_capture
from .harness import STEPS, TOTAL, assert_same, snapshot, start
from .methods import FRACTIONS, GlobalThreshold, MethodCase, smallest, some_costs
from .models import MODELS
from .test_capture import as_on_a_device  # noqa: F401 - a fixture

# In the convnet: 216 and 24 weights, which are no neighbours, and 72 + 48.
SHARE = {"stem.*": 0.7, nn.Linear: 0.5, "*": 0.9}
GROUPS = {"stem": (["stem.weight"], 0.7), "head": (["head.weight"], 0.5),
          "rest": (["depth.weight", "point.weight"], 0.9)}  # fmt: skip
ENDS = re.compile("^(stem|head)")
TWO = {ENDS: 0.6, "*": 0.85}
ALLOCATED = [name for name in METHODS if "allocation" in method_options(name)]


def zeros(model: nn.Module, names: list[str]) -> int:
    return sum(int((model.get_parameter(name) == 0).sum()) for name in names)


@pytest.mark.parametrize("method", ALLOCATED)
def test_each_group_is_met_exactly_at_every_step(method):
    rises = "linear" if method == "spartan" else "cubic"
    end = TOTAL // 5 if method == "spartan" else TOTAL // 2
    options = {"allocation": "global"} if "gmp" in method else {}
    run = start("convnet", method=method, sparsity=SHARE, **options)
    for step in range(TOTAL):
        fraction = FRACTIONS[rises](step, 0, end)
        for names, target in GROUPS.values():
            size = sum(run.case.prunable[name] for name in names)
            assert zeros(run.model, names) == round(target * fraction * size), (step, names)
        run.train(step, step + 1)
    total = sum(round(t * sum(run.case.prunable[n] for n in names)) for names, t in GROUPS.values())
    assert run.zeros() == total == 271
    assert run.sparsifier.target == run.sparsifier.sparsity == total / run.case.size
    run.sparsifier.finalize()
    assert run.zeros() == total


@pytest.mark.parametrize("allocation", [*ALLOCATIONS, "bounds", "flops"])
def test_the_allocation_in_a_group_is_that_of_a_network(allocation):
    """A network of that group alone has the same mask."""
    made = {
        "bounds": Global(min_density=0.3),
        "flops": FlopsBiased(1.0, costs=some_costs(MODELS["convnet"])),
    }.get(allocation, allocation)  # fmt: skip
    settings = {"schedule": "constant", "total_steps": TOTAL}
    most = 0.3 if allocation == "uniform-dense-depthwise" else 0.6  # it spares more than half
    run = start("convnet", sparsity={ENDS: 0.1, "*": most}, allocation=made, **settings)
    ends = {"include": ENDS, "exclude": "*.bias"}
    for filters, fraction in ((ends, 0.1), ({"exclude": ENDS}, most)):
        alone = run.case.make()
        sparsifier = feather.sparsify(
            alone, torch.optim.SGD(alone.parameters(), 0.1), sparsity=fraction, allocation=made,
            **filters, **settings,
        )  # fmt: skip
        for name, mask in sparsifier.masks().items():
            assert torch.equal(run.model.get_parameter(name) != 0, mask), name


def test_ties_in_a_group_of_distant_tensors_are_pruned_in_their_order():
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
    model[1].bfloat16()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        feather.sparsify(model, optimizer, sparsity={"[03].*": 0.7, "*": 0.3},
                         total_steps=4, schedule="constant")  # fmt: skip
    for layers, fraction in (((0, 3), 0.7), ((2, 1), 0.3)):  # float32 precedes bfloat16
        kept, _ = smallest([torch.ones(4, 4) for _ in layers], round(fraction * 32))
        for i, mask in zip(layers, kept, strict=True):
            assert torch.equal(model[i].weight != 0, mask), i


def test_bounds_that_are_active_at_times_use_separate_memory():
    run = start("convnet", sparsity=TWO, min_density=0.1)
    for step in range(TOTAL):
        run.train(step, step + 1)
        masks = run.sparsifier.masks()
        assert all(torch.equal(run.model.get_parameter(n) != 0, m) for n, m in masks.items())
        assert all(m.double().mean() >= 0.1 for m in masks.values())


@pytest.mark.parametrize("method", ["feather", "spartan", "feather-flops"])
def test_targets_of_groups_survive_a_restart_and_differ_in_checkpoints(method):
    costs = some_costs(MODELS["convnet"])
    options = {"costs": costs, "gamma": 1.0} if method == "feather-flops" else {}
    whole = start("convnet", method=method, sparsity=TWO, **options).train(0, 4)
    checkpoint, state = whole.save(), whole.sparsifier.state_dict()
    end = snapshot(whole.train(4, STEPS))
    resumed = start("convnet", method=method, sparsity=TWO, seed=3, **options).load(checkpoint)
    assert_same(snapshot(resumed.train(4, STEPS)), end)
    # The same number of zeros in all, elsewhere.
    other = {"stem.*": 144 / 216, "*": 102 / 144}
    swapped = start("convnet", method=method, sparsity=other, **options)
    assert swapped.sparsifier.target == whole.sparsifier.target
    with pytest.raises(feather.StateError, match="method"):
        swapped.sparsifier.load_state_dict(state)


def test_an_average_of_the_latents_has_the_zeros_of_each_group():
    run = start("convnet", sparsity=SHARE)
    average = feather.LatentAverage(run.sparsifier, decay=0.5)
    for step in range(TOTAL):
        run.train(step, step + 1)
        average.update()
    copied = average.copy_to(run.case.make())
    for names, target in GROUPS.values():
        assert zeros(copied, names) == round(target * sum(run.case.prunable[n] for n in names))


@pytest.mark.usefixtures("as_on_a_device")
def test_steps_with_groups_can_be_captured(monkeypatch):
    case = MethodCase("groups", "feather", GlobalThreshold, TWO, {"min_density": 0.1})
    monkeypatch.setitem(methods.METHODS, "groups", case)
    hooked = test_capture.CapturedLoop("groups").train(0, 12).end()
    loop = test_capture.CapturedLoop("groups").train(0, 2)
    loop.feed(2)
    with test_capture.Tape() as tape:
        loop.step()
    assert_same(loop.train(3, 12, tape.replay).end(), hooked)


@pytest.mark.parametrize(
    ("sparsity", "options", "words"),
    [
        ({}, {}, "empty mapping"),
        ({"stem.*": 0.5}, {}, r"no target for depth\.weight.*exclude="),
        ({"*": 0.5, "stem.*": 0.9}, {}, r"'stem\.\*'.*put the special ones first"),
        ({"norm.*": 0.5, "*": 0.9}, {}, r"'norm\.\*' matches the name of no prunable weight"),
        ({"*": 1.0}, {}, r"sparsity\['\*'\].*\[0, 1\)"),
        ({"*": "half"}, {}, r"sparsity\['\*'\].*\[0, 1\)"),
        ({"*": 0.5}, {"count": "all"}, "groups"),
        ({"stem.*": 0.9, "*": 0.1}, {"min_density": 0.3}, r"group of stem\.weight: .*min_density"),
        ({"*": 0.5}, {"method": "asl"}, "one number"),
        ({"*": 0.5}, {"method": "probmask"}, "one number"),
        ({"*": 0.5}, {"method": "str"}, "one number"),
        ({"*": 0.5}, {"allocation": FlopsBiased(budget=5.0, costs={})}, "budget"),
    ],
    ids=str,
)
def test_invalid_targets_of_groups_are_an_error(sparsity, options, words):
    with pytest.raises(ConfigurationError, match=words):
        start("convnet", sparsity=sparsity, **options)


def test_a_group_may_stay_dense_and_all_of_them_may():
    run = start("convnet", sparsity={"head.*": 0, "*": 0.8}).train(0, TOTAL)
    assert run.zeros() == round(0.8 * 336)
    assert zeros(run.model, ["head.weight"]) == 0
    assert start("convnet", sparsity={"*": 0.0}).train(0, TOTAL).zeros() == 0


# --- counted over all parameters ------------------------------------------------------------


@pytest.mark.parametrize("method", ["feather", "asl"])
def test_a_target_counted_over_all_parameters_is_met_exactly(method):
    options = {"dense_below": 0} if method == "asl" else {}
    run = start("convnet", method=method, sparsity=0.8, count="all", **options).train(0, TOTAL)
    every = sum(p.numel() for p in run.model.parameters())
    assert every == 394
    assert run.zeros() == round(0.8 * every)
    assert run.sparsifier.target == round(0.8 * every) / 360
    report = run.sparsifier.report()
    assert report.sparsity_of_all == run.zeros() / every
    assert report.sparsity == run.zeros() / 360


def test_a_target_beyond_all_prunable_weights_is_an_error_that_names_the_highest():
    with pytest.raises(ConfigurationError, match=r"only 360 of them.*0\.911168"):
        start("convnet", sparsity=0.95, count="all")
    run = start("convnet", sparsity=0.911168, count="all", schedule="constant")
    assert run.zeros() == 359


def test_an_unknown_count_is_an_error_that_names_the_known_ones():
    with pytest.raises(ConfigurationError, match="'prunable' or 'all'"):
        start("convnet", sparsity=0.9, count="everything")


# --- models that are sparse already ---------------------------------------------------------


def sparse_start(method: str, sparsity: float, already: float, model="convnet", **options):
    """A run on a model that is partly 0 already, and copies of its weights."""
    run = start(model, schedule="constant", sparsity=already)
    net = run.sparsifier.finalize()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = feather.sparsify(
        net, optimizer, method, sparsity=sparsity, total_steps=TOTAL, **options
    )
    run.optimizer, run.sparsifier = optimizer, sparsifier
    run.loop.optimizers, run.loop.method = [optimizer], sparsifier
    return run, before


@pytest.mark.parametrize("target", [0.8, 0.9, 0.6])
@pytest.mark.parametrize(
    "method", ["feather", "hard-ste", "soft-ste", "gmp", "feather-flops", "st3"]
)
def test_a_sparse_model_starts_unchanged_from_its_own_sparsity(method, target):
    options = {"allocation": "global"} if method == "gmp" else {}
    if method == "feather-flops":
        options = {
            "gamma": 1.0,
            "costs": some_costs(MODELS["convnet"]),
        }
    run, before = sparse_start(method, target, 0.8, **options)
    assert_same({n: p.detach() for n, p in run.model.named_parameters()}, before)
    seen = []
    for step in range(TOTAL):
        seen.append(run.zeros())
        run.train(step, step + 1)
    assert seen[0] == round(0.8 * 360)
    assert seen == sorted(seen, reverse=target < 0.8)
    assert run.zeros() == round(target * 360)


@pytest.mark.parametrize("sparsity", [0.9, {"*": 0.9}], ids=str)
def test_masks_that_are_soft_at_first_start_from_all_weights(sparsity):
    run, before = sparse_start("spartan", sparsity, 0.8)
    assert_same({n: p.detach() for n, p in run.model.named_parameters()}, before)
    assert run.sparsifier.sparsity == 0
    assert run.train(0, TOTAL).zeros() == round(0.9 * 360)


def test_a_layer_that_starts_at_zero_learns():
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4))
    nn.init.zeros_(model[1].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, "gmp", sparsity=0.5, total_steps=20)
    for _ in range(20):
        (model(torch.randn(8, 6)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model[1].weight != 0).sum() == 24


@pytest.mark.parametrize("sparsity", [0.5, {"*": 0.5}], ids=str)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_layer_of_zeros_does_not_count_as_sparse(allocation, sparsity):
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4))
    nn.init.zeros_(model[1].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, "gmp", sparsity=sparsity, total_steps=50, allocation=allocation
    )
    assert sparsifier.sparsity == 0
    (model(torch.randn(8, 6)) - 1).square().mean().backward()
    optimizer.step()
    assert (model[1].weight != 0).sum() > 36


@pytest.mark.parametrize(
    ("method", "options"), [("gmp", {}), ("feather", {"min_density": 0.3})], ids=["gmp", "feather"]
)
def test_a_model_may_begin_with_more_zeros_than_the_allocation_would_prune(method, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    with torch.no_grad():
        for p in (model[0].weight, model[2].weight):
            p.view(-1)[: p.numel() * 9 // 10] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, method, sparsity=0.2, total_steps=TOTAL, **options
    )
    assert 0.2 < sparsifier.sparsity < 0.9
    for _ in range(TOTAL):
        model(torch.randn(4, 3, 3, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.sparsity == round(0.2 * 280) / 280


def test_groups_start_from_their_own_zeros():
    run = start("convnet", schedule="constant", sparsity={"head.*": 0.25, "*": 0.75})
    net = run.sparsifier.finalize()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    feather.sparsify(net, optimizer, sparsity={"head.*": 0.5, "*": 0.9}, total_steps=TOTAL)
    assert_same({n: p.detach() for n, p in net.named_parameters()}, before)


def test_the_sparsity_that_training_began_at_survives_a_restart_from_a_dense_model():
    run, _ = sparse_start("feather", 0.95, 0.8)
    run.train(0, 2)
    checkpoint = run.save()
    fresh = start("convnet", "sgd", sparsity=0.95)
    fresh.optimizer = torch.optim.SGD(fresh.model.parameters(), lr=0.1, momentum=0.9)
    fresh.sparsifier.detach()
    fresh.sparsifier = feather.sparsify(
        fresh.model, fresh.optimizer, sparsity=0.95, total_steps=TOTAL
    )
    fresh.loop.optimizers, fresh.loop.method = [fresh.optimizer], fresh.sparsifier
    fresh.load(checkpoint)
    assert_same(snapshot(fresh.train(2, STEPS)), snapshot(run.train(2, STEPS)))


@pytest.mark.parametrize(
    ("sparsity", "theta"),
    [
        (0.95, 1.0),
        ({"*": 0.95}, 1.0),
        ({"0.*": 0.95, "1.*": 0.95}, 1.0),
        ({"0.*": 0.9501, "1.*": 0.95}, 0.5),
        ({"0.*": 0.96, "1.*": 0.5}, 1.0),
    ],
    ids=str,
)
def test_theta_depends_on_the_requested_sparsity_alone(sparsity, theta):
    """round(.95 n) of 6944 weights are 95.003 % of them."""
    model = nn.Sequential(nn.Linear(101, 62), nn.Linear(62, 11))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = feather.sparsify(model, optimizer, sparsity=sparsity, total_steps=2)
    assert sparsifier.method.gradient.theta == theta

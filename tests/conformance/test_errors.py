"""Errors for invalid input name what was wrong, where, and what to do."""

import copy
import math
import pickle
import re
import warnings

import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import nn

import torch_feather as feather
from torch_feather.errors import ConfigurationError, FeatherError, StateError

from .harness import STEPS, Loop, Run, assert_exact, assert_same, snapshot, start, unchanged
from .models import MODELS
from .optimizers import OPTIMIZERS, as_list


def sparsify(model=None, optimizer=None, method="feather", **settings):
    model = MODELS["mlp"].make() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    settings = {"sparsity": 0.8, "total_steps": 10} | settings
    return feather.sparsify(model, optimizer, method, **settings)


# --- targets and options --------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 95, math.nan, math.inf, "0.9", None])
def test_sparsity_outside_0_to_1(sparsity):
    with pytest.raises(ConfigurationError, match=r"sparsity.*\[0, 1\)"):
        sparsify(sparsity=sparsity)


@pytest.mark.parametrize("total_steps", [0, -5, 2.5, math.nan, "10", None])
def test_total_steps_below_1(total_steps):
    with pytest.raises(ConfigurationError, match="total_steps"):
        sparsify(total_steps=total_steps)


@pytest.mark.parametrize(
    "bounds",
    [{"begin": 5, "end": 5}, {"begin": 6, "end": 5}, {"begin": 5}, {"begin": -1}, {"end": 0},
     {"end": 11}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_an_impossible_schedule_is_an_error(schedule, bounds):
    with pytest.raises(ConfigurationError, match=r"begin|end"):
        sparsify(schedule=schedule, **bounds)


@pytest.mark.parametrize(
    ("method", "options"),
    [("feather", {"end": 0.5}), ("feather", {"begin": 0.1}), ("gmp", {"every": 2.5}),
     ("spartan", {"end": 0.2}), ("spartan", {"freeze": 0.8}), ("feather", {"end": "5"}),
     ("feather", {"schedule": "one-shot", "begin": 0.5})],
    ids=str,
)  # fmt: skip
def test_a_fraction_of_training_instead_of_steps_is_an_error(method, options):
    with pytest.raises(ConfigurationError, match="is a number of optimizer steps, not a fraction"):
        sparsify(method=method, **options)


WRONG_CALLS = {
    "group": lambda m, s: sparsify(sparsity={3: 0.5}),
    "passes": lambda m, s: list(s.passes("two")),
    "no pass": lambda m, s: list(s.passes(0)),
    "thresholds": lambda m, s: feather.report(m, thresholds=3),
    "weights": lambda m, s: feather.power_threshold("w", 1.0),
    "integers": lambda m, s: feather.power_threshold(torch.ones(2, dtype=torch.int64), 1.0),
    "threshold": lambda m, s: feather.power_threshold(torch.ones(2), "tau"),
    "exponent": lambda m, s: feather.power_threshold(torch.ones(2), 1.0, "p"),
    "classes": lambda m, s: feather.models.resnet20(-1),
    "channels": lambda m, s: feather.models.mobilenet_v1(10, "rgb"),
    "number of classes": lambda m, s: feather.models.densenet40_24(2.5),
    "factory": lambda m, s: feather.testing.check_method(None),
    "property": lambda m, s: feather.testing.check_method("gmp", skip={"speed"}),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_wrong_argument_of_a_public_function_is_an_error_that_shows_it(call):
    model = MODELS["mlp"].make()
    with pytest.raises(ConfigurationError, match=r"got |known: "):
        WRONG_CALLS[call](model, sparsify(model))


@pytest.mark.parametrize("average", [False, True])
def test_a_sparsifier_cannot_be_pickled_and_the_error_says_what_to_save(average):
    sparsifier = sparsify()
    held = feather.LatentAverage(sparsifier) if average else sparsifier
    with pytest.raises(StateError, match=r"cannot be pickled.*Save the state dicts"):
        pickle.dumps({"epoch": 3, "held": held})
    with pytest.raises(StateError, match="cannot be pickled"):
        copy.copy(held)
    assert copy.deepcopy(sparsifier).sparsity == sparsifier.sparsity


def test_whole_numbers_of_steps_may_be_floats():
    assert sparsify(end=5.0).method == sparsify(end=5).method
    assert sparsify(method="gmp", every=2.0).method == sparsify(method="gmp", every=2).method


@pytest.mark.parametrize("bounds", [{"begin": 5}, {"end": 9}], ids=str)
def test_a_schedule_without_a_ramp_takes_no_bounds(bounds):
    with pytest.raises(ConfigurationError, match="has no ramp"):
        sparsify(schedule="constant", **bounds)
    with pytest.raises(ConfigurationError, match="has no ramp"):
        sparsify(schedule="one-shot", **{"end": 9} | bounds)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("fether", "feather"),
        ("hard_ste", "hard-ste"),
        ("Feather", "feather"),
        ("softste", "soft-ste"),
    ],
)
def test_an_unknown_method_names_the_nearest(given, nearest):
    with pytest.raises(ConfigurationError, match=f"{given}.*{nearest}"):
        sparsify(method=given)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("tetha", "theta"),
        ("schedul", "schedule"),
        ("min_densty", "min_density"),
        ("beginn", "begin"),
    ],
)
def test_an_unknown_option_names_the_nearest(given, nearest):
    with pytest.raises((ConfigurationError, TypeError), match=f"{given}.*{nearest}"):
        sparsify(**{given: 1})


def test_an_unknown_schedule_names_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"(?s)(?=.*cubik)(?=.*'cubic')"):
        sparsify(schedule="cubik")


@pytest.mark.parametrize("p", [0.5, 0, -3, math.nan, "three", None])
def test_p_below_1(p):
    with pytest.raises((ConfigurationError, TypeError), match=r"\bp\b"):
        sparsify(p=p)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("asl", "dense_below", -1),
        ("asl+", "dense_below", -1),
        ("str", "s_init", -1e300),
        ("str", "s_init", math.nan),
        ("probmask", "passes", 10**18),
        ("probmask", "passes", 0),
    ],
)
def test_an_option_outside_its_range_is_named(method, option, value):
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=option):
        feather.sparsify(model, optimizer, method, sparsity=0.5, total_steps=10, **{option: value})


@pytest.mark.parametrize("theta", [-0.1, 1.1, math.nan, "Auto", "half"])
def test_theta_outside_0_to_1(theta):
    with pytest.raises((ConfigurationError, TypeError), match="theta"):
        sparsify(theta=theta)


def test_theta_is_one_half_above_95_percent_and_only_there():
    def pulled(sparsity):
        model = nn.Linear(20, 20, bias=False)
        sparsify(model, sparsity=sparsity, schedule="constant")
        model.weight.sum().backward()
        return float(model.weight.grad[model.weight == 0].unique())

    assert pulled(0.95) == 1.0
    assert pulled(0.9501) == 0.5
    assert pulled(0.99) == 0.5


# --- models and optimizers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "filters"),
    [(nn.BatchNorm1d(4), {}), (nn.Embedding(5, 3), {}), (nn.Linear(3, 3), {"exclude": "*"}),
     (nn.Linear(3, 3), {"include": "no.such.*"})],
    ids=str,
)  # fmt: skip
def test_nothing_prunable(model, filters):
    with pytest.raises(ConfigurationError, match="prun"):
        sparsify(model, **filters)


@pytest.mark.parametrize("method", ["feather", "st3", "st3-sigma", "probmask"])
def test_include_of_a_scalar_parameter_is_an_error(method):
    model = MODELS["mlp"].make()
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    with pytest.raises(ConfigurationError, match=r"scale is a single number.*exclude='scale'"):
        sparsify(model, method=method, include="*")
    sparsify(model, method=method, include="*", exclude="scale")


@pytest.mark.parametrize("method", ["asl", "asl+", "feather-asl+", "str", "feather-ham"])
def test_an_optimizer_without_a_learning_rate_that_the_method_follows(method):
    class Plain(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    model = MODELS["mlp"].make()
    optimizer = Plain(model.parameters())
    options = {"dense_below": 0} if "asl" in method else {}
    with pytest.raises(ConfigurationError, match=r"no learning rate \(lr\)"):
        sparsify(model, optimizer, method, **options)
    assert not as_hooks(optimizer)
    assert not any(p._backward_hooks for p in model.parameters())
    sparsify(model, optimizer, "probmask")  # has a rate of its own


def test_everything_frozen():
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="prun"):
        sparsify(model)


def test_a_parameter_that_no_optimizer_holds():
    model = MODELS["mlp"].make()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"2\.weight"):
        sparsify(model, optimizer)
    assert not as_hooks(optimizer)


def test_a_parameter_that_two_optimizers_hold():
    model = MODELS["mlp"].make()
    both = [torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD([model[2].weight], 0.1)]
    with pytest.raises(ConfigurationError, match=r"2\.weight"):
        sparsify(model, both)
    assert not any(as_hooks(optimizer) for optimizer in both)


def test_the_same_optimizer_given_twice():
    model = MODELS["mlp"].make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigurationError):
        sparsify(model, [optimizer, optimizer])


@pytest.mark.parametrize(
    "optimizer", [object(), [], [object()], lambda: None, "sgd"], ids=lambda o: type(o).__name__
)
def test_an_optimizer_of_another_type_is_an_error(optimizer):
    with pytest.raises((ConfigurationError, TypeError), match=r"[Oo]ptimizer"):
        sparsify(optimizer=optimizer)


@pytest.mark.parametrize("model", [None, 3, "net", nn.Linear], ids=str)
def test_a_model_of_another_type_is_an_error(model):
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises((ConfigurationError, TypeError), match=r"[Mm]odel|Module"):
        feather.sparsify(model, torch.optim.SGD([parameter], 0.1), sparsity=0.5, total_steps=10)


@pytest.mark.parametrize(
    "call",
    [
        feather.sparsity,
        feather.report,
        feather.LatentAverage,
        lambda model: feather.count_flops(model, torch.ones(1, 3)),
        lambda model: feather.recalibrate_batchnorm(model, [torch.ones(1, 3)]),
        lambda model: feather.compile_sparse(model, torch.ones(1, 3)),
        lambda model: feather.keep_zeros(model, torch.optim.SGD([torch.ones(2)], 0.1)),
        lambda model: feather.keep_zeros(nn.Linear(2, 2), model),
        lambda model: feather.save_sparse(model, "unused"),
        lambda model: feather.load_sparse("unused", model),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("wrong", [None, 3, "net", nn.Linear], ids=str)
def test_what_is_no_model_is_an_error_of_the_package_at_every_door(call, wrong):
    with pytest.raises(ConfigurationError, match=r"[Mm]odule|Sparsifier|optimizer"):
        call(wrong)


@pytest.mark.parametrize("method", [3, None, object(), ["feather"]], ids=lambda m: type(m).__name__)
def test_a_method_of_another_type_is_an_error(method):
    with pytest.raises(ConfigurationError, match="method must be the name of a method"):
        sparsify(method=method)


def test_more_steps_than_a_schedule_can_hold_are_an_error():
    with pytest.raises(ConfigurationError, match=r"total_steps must be at most 1,000,000,000"):
        sparsify(total_steps=10**12)


def _lookahead(parameters):
    return pytorch_optimizer.Lookahead(torch.optim.AdamW(parameters), k=2)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (schedulefree.AdamWScheduleFree, "AdamWScheduleFree"),
        (schedulefree.SGDScheduleFree, "SGDScheduleFree"),
        (schedulefree.RAdamScheduleFree, "RAdamScheduleFree"),
        (pytorch_optimizer.ScheduleFreeAdamW, "ScheduleFreeAdamW"),
        (_lookahead, "Lookahead"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_optimizers_that_write_outside_their_step_are_an_error_that_names_them(make, name):
    model = MODELS["mlp"].make()
    with pytest.raises(ConfigurationError, match=name):
        sparsify(model, make(model.parameters()))


class CPUOffloadOptimizer(torch.optim.SGD):
    """Has the name of torchao's."""


def test_an_optimizer_that_trains_copies_of_the_weights_is_an_error_that_names_it():
    model = MODELS["mlp"].make()
    with pytest.raises(ConfigurationError, match=r"CPUOffloadOptimizer .* CPUOffloadPolicy"):
        sparsify(model, CPUOffloadOptimizer(model.parameters(), lr=0.1))


def test_check_ranks_in_one_process_takes_over_external_writes():
    """There is nothing to exchange; like every check it takes over what was written before."""
    sparsifier = sparsify()
    with torch.no_grad():
        sparsifier.model[0].weight[0, 0] = 5.0
    written = {n: p.detach().clone() for n, p in sparsifier.model.named_parameters()}
    sparsifier.check_ranks()
    assert sparsifier.step.training.weights.views[0][0, 0] == 5.0
    assert_same({n: p.detach() for n, p in sparsifier.model.named_parameters()}, written)


def test_a_model_that_is_sparsified_already():
    model = MODELS["mlp"].make()
    sparsify(model)
    with pytest.raises(ConfigurationError, match=r"already"):
        sparsify(model)


def test_an_optimizer_that_is_attached_already():
    model = MODELS["mlp"].make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsify(model, optimizer)
    with pytest.raises(ConfigurationError, match=r"already"):
        sparsify(model, optimizer)


def test_a_call_that_raises_leaves_model_and_optimizer_unchanged():
    model = MODELS["mlp"].make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weights = [p.detach().clone() for p in model.parameters()]
    refused = [
        {"sparsity": 2},
        {"method": "none"},
        {"theta": 7},
        {"begin": 9, "end": 3},
        {"min_density": 0.9},
        {"include": 5},
        {"option": 1},
    ]
    for settings in refused:
        with pytest.raises((FeatherError, TypeError)):
            sparsify(model, optimizer, **settings)
        assert not as_hooks(optimizer)
        assert_same([p.detach() for p in model.parameters()], weights)
        assert not any(p._backward_hooks for p in model.parameters())
    sparsify(model, optimizer)


def as_hooks(optimizer) -> list:
    return [
        *optimizer._optimizer_step_pre_hooks,
        *optimizer._optimizer_step_post_hooks,
        *optimizer._optimizer_state_dict_post_hooks,
        *optimizer._optimizer_load_state_dict_pre_hooks,
    ]


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw", "adamw-fused", "muon+adamw"])
def test_an_optimizer_keeps_the_state_that_it_has(optimizer):
    """Dense training first, sparse training from there on: momentum is kept."""
    case = MODELS["mlp"]
    net = case.make()
    made = OPTIMIZERS[optimizer](net)
    loop = Loop(net, net, made, case)
    for step in range(3):
        loop.step(step)
    state = [one.state_dict()["state"] for one in as_list(made)]
    latent = {n: p.detach().clone() for n, p in case.weights(net).items()}
    sparsifier = feather.sparsify(net, made, sparsity=0.8, total_steps=6, schedule="constant")
    run = Run(net, made, sparsifier, loop, case)
    assert sparsifier.step_count == 0
    assert_same(sparsifier.latent_weights(), latent)
    for one, before in zip(as_list(made), state, strict=True):
        for key, entries in before.items():
            for name, value in entries.items():
                assert one.state_dict()["state"][key][name] is value
    run.train(3, 8)
    assert_exact(run)
    assert sparsifier.step_count == 5


def test_reading_before_the_first_step_works():
    run = start()
    assert run.sparsifier.step_count == 0
    assert run.sparsifier.sparsity == 0
    assert all(mask.all() for mask in run.sparsifier.masks().values())
    assert all(tau == 0 for tau in run.sparsifier.thresholds().values())
    assert run.sparsifier.parameters() == []
    assert str(run.sparsifier.report())


def test_sparsity_0_trains_densely():
    run = start(sparsity=0.0).train(0, STEPS)
    assert run.zeros() == 0
    run.sparsifier.finalize()


# --- weights that are no numbers ------------------------------------------------------------


def poison(run, value: float) -> None:
    """One latent weight of the second layer becomes `value` in the next step."""
    run.loop.gradients(0)
    run.model[2].weight.grad[1, 3] = value
    run.optimizer.step()


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_nan_stays_visible_in_the_model_and_is_raised_with_its_name(sparsity):
    """Pruning it would hide a lost run. On a CPU the step itself raises."""
    run = start(optimizer="sgd", sparsity=sparsity, schedule="constant")
    with pytest.raises(FloatingPointError, match=r"2\.weight"):
        poison(run, math.nan)
    assert run.model[2].weight[1, 3].isnan()
    assert run.sparsifier.latent_weights()["2.weight"][1, 3].isnan()
    assert run.sparsifier.masks()["2.weight"][1, 3]
    # The count is exact all the same.
    assert run.zeros() == round(sparsity * 120)


def test_nan_at_the_start_is_raised_by_the_first_step_at_the_latest():
    model = MODELS["mlp"].make()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def begin():
        sparsify(model, optimizer, schedule="constant")
        optimizer.step()

    with pytest.raises(FloatingPointError, match=r"2\.weight"):
        begin()
    assert model[2].weight[0, 0].isnan()


def test_nan_everywhere_is_still_a_clear_error():
    run = start(optimizer="sgd", schedule="constant")
    for p in run.model.parameters():
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(FloatingPointError, match=r"0\.weight"):
        run.optimizer.step()
    assert all(p.isnan().any() for p in run.model.parameters())


def test_finalize_raises_for_nan():
    run = start(optimizer="sgd", schedule="constant")
    with torch.no_grad():
        run.model[2].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"2\.weight"):
        run.sparsifier.finalize()


@pytest.mark.parametrize("method", ["feather", "hard-ste", "soft-ste"])
def test_infinite_weights_rank_highest_and_are_kept(method):
    run = start(optimizer="sgd", method=method, sparsity=0.9, schedule="constant")
    poison(run, -math.inf)
    assert run.model[2].weight[1, 3] == math.inf
    assert run.sparsifier.masks()["2.weight"][1, 3]
    assert not any(p.isnan().any() for p in run.model.parameters())
    assert_exact(run)


# --- calls at the wrong time ----------------------------------------------------------------


@pytest.mark.parametrize("call", ["reset_latents", "load_state_dict", "finalize"])
def test_a_detached_sparsifier_raises(call):
    run = start().train(0, STEPS)
    state = run.sparsifier.state_dict()
    run.sparsifier.detach()
    arguments = [state] if call == "load_state_dict" else []
    with pytest.raises(StateError, match=r"finalize|detach"):
        getattr(run.sparsifier, call)(*arguments)


def test_a_group_added_later_stays_dense_with_one_warning():
    run = start(schedule="constant")
    for number, name in enumerate(["3.weight", "4.weight"]):
        late = nn.Linear(4, 4)
        run.model.append(late)
        run.optimizer.add_param_group({"params": late.parameters()})
        with pytest.warns(feather.FeatherWarning, match=rf"^{re.escape(name)} was added"):
            run.train(2 * number, 2 * number + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", feather.FeatherWarning)
            run.train(2 * number + 1, 2 * number + 2)  # once for each group
        assert (late.weight != 0).all()
    assert run.sparsifier.step_count == 4
    assert sum(int((~m).sum()) for m in run.sparsifier.masks().values()) == 96


def test_a_group_of_biases_added_later_needs_no_warning():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    biases = [model[0].bias, model[2].bias]
    optimizer = torch.optim.SGD([model[0].weight, model[2].weight], 0.1, 0.9)
    sparsifier = sparsify(model, optimizer)
    run = Run(model, optimizer, sparsifier, Loop(model, model, optimizer, MODELS["mlp"]),
              MODELS["mlp"])  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": biases})
        run.train(0, 4)
        state = run.save()
        assert_exact(run.load(state))


def test_an_invalid_state_dict_is_an_error():
    run = start().train(0, 2)
    for state in ({}, {"latent": {}}, {"state": {}, "param_groups": []}):
        with unchanged(run), pytest.raises((StateError, ValueError, KeyError)):
            run.sparsifier.load_state_dict(state)
    other = start().train(0, 2)
    assert_same(snapshot(run), snapshot(other))


def test_weights_that_begin_to_train_after_sparsify_are_named_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=4)

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error", feather.FeatherWarning)
        step()
    model[0].requires_grad_(True)
    with pytest.warns(feather.FeatherWarning, match=r"^0\.weight was .* frozen"):
        step()
    model.append(late := nn.Linear(4, 4))
    optimizer.param_groups[0]["params"] += list(late.parameters())
    with pytest.warns(feather.FeatherWarning, match=r"^3\.weight was added"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", feather.FeatherWarning)
        step()


@pytest.mark.parametrize("where", ["closure", "hook"])
@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_training_cannot_end_within_a_step(where, end):
    """There the parameters hold latent weights, which finalize would leave in the model."""
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    calls = []
    if where == "hook":
        optimizer.register_step_post_hook(lambda *_: [call() for call in calls])
    sparsifier = feather.sparsify(
        model, optimizer, sparsity=0.5, total_steps=4, schedule="constant"
    )
    calls.append(getattr(sparsifier, end))
    with pytest.raises(StateError, match=r"Within optimizer\.step"):
        optimizer.step(calls[0] if where == "closure" else None)
    calls.clear()
    optimizer.step()
    optimizer.register_step_post_hook(lambda *_: sparsifier.finalize(force=True))
    optimizer.step()
    assert int((model.weight == 0).sum()) == 16


def sharing_memory() -> nn.Module:
    memory = torch.randn(100)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(memory[:64].view(8, 8))
    model[1].weight = nn.Parameter(memory[36:].view(8, 8))
    return model


def of_8_bits() -> nn.Module:
    model = nn.Linear(8, 8)
    model.weight = nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn))
    return model


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (sharing_memory, {}, r"0\.weight and 1\.weight are different parameters in the same mem"),
        (of_8_bits, {}, r"weight is torch\.float8_e4m3fn\. Only floating-point weights of 16"),
        (lambda: nn.Linear(8, 8), {"include": re.compile(b"weight")}, "a compiled regex of text"),
        (lambda: nn.Linear(8, 8), {"schedule": lambda step: 0.5}, "an object with table"),
    ],
)
def test_what_cannot_be_trained_sparse_is_an_error_of_the_package(make, settings, message):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigurationError, match=message):
        feather.sparsify(model, optimizer, sparsity=0.5, total_steps=4, **settings)


def test_weights_beside_each_other_in_one_memory_are_trained():
    memory = torch.randn(128)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer, part in zip(model, (memory[:64], memory[64:]), strict=True):
        layer.weight = nn.Parameter(part.view(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=4, schedule="constant")
    assert int((memory == 0).sum()) == 64


def test_frozen_weights_of_8_bits_are_measured():
    model = nn.Sequential(of_8_bits().requires_grad_(False), nn.Linear(8, 8))
    model[0].weight.data[0] = (-torch.zeros(8)).to(torch.float8_e4m3fn)
    assert [row.zeros for row in feather.report(model).layers] == [8, 0]

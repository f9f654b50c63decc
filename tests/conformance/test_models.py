"""Ordinary models stay ordinary: compiled, copied, averaged, tied, cast, filtered, saved."""

import copy
import io
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import torch_feather as feather
from torch_feather.errors import ConfigurationError, StateError

from .harness import STEPS, TOTAL, Loop, Run, assert_exact, assert_same, snapshot, start
from .methods import some_costs
from .models import MODELS
from .optimizers import OPTIMIZERS
from .test_trajectory import compare


def zeros(model: nn.Module, *names: str) -> int:
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name] == 0).sum()) for name in names)


def attach(model: nn.Module, sparsity: float = 0.5, **settings):
    """Sparse from the start, with plain SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    settings = {"total_steps": 4, "schedule": "constant"} | settings
    return feather.sparsify(model, optimizer, sparsity=sparsity, **settings), optimizer


# --- torch.compile --------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "convnet", "attention"])
@pytest.mark.parametrize("when", ["after", "before"])
def test_a_compiled_model_is_compiled_once(model, when):
    """Sparsity, thresholds and weights change at every step; the graphs do not."""
    torch._dynamo.reset()
    case = MODELS[model]
    counter = CompileCounterWithBackend("aot_eager")
    net = case.make()
    compiled = torch.compile(net, backend=counter) if when == "before" else None
    optimizer = OPTIMIZERS["sgd-momentum"](net)
    sparsifier = feather.sparsify(
        net if compiled is None else compiled, optimizer, sparsity=0.8, total_steps=TOTAL, theta=0.5
    )
    if compiled is None:
        compiled = torch.compile(net, backend=counter)
    loop = Loop(compiled, net, optimizer, case)
    loop.step(0)
    graphs = counter.frame_count
    assert graphs >= 1
    run = Run(net, optimizer, sparsifier, loop, case).train(1, STEPS)
    assert counter.frame_count == graphs
    assert set(sparsifier.masks()) == set(case.prunable)
    eager = start(model, theta=0.5).train(0, STEPS)
    for p, q in zip(net.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert run.zeros() == eager.zeros()


@pytest.mark.slow
def test_inductor_follows_the_autograd_form():
    torch._dynamo.reset()
    compare("feather-theta", prepare=torch.compile)


def test_a_compiled_optimizer_step_is_sparse_too():
    """`torch.compile(optimizer.step)`: the hooks run inside or around the compiled function."""
    torch._dynamo.reset()
    run, other = start("mlp", "sgd-foreach"), start("mlp", "sgd-foreach").train(0, 4)
    step = torch.compile(run.optimizer.step, backend="eager")
    for number in range(4):
        run.loop.gradients(number)
        step()
    assert run.sparsifier.step_count == 4
    assert_exact(run)
    assert_same(run.sparsifier.latent_weights(), other.sparsifier.latent_weights())


# --- memory and types -----------------------------------------------------------------------


def test_channels_last_trains_the_same_and_stays_channels_last():
    case = MODELS["convnet"]
    net = case.make().to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["sgd-momentum"](net)
    sparsifier = feather.sparsify(net, optimizer, sparsity=0.8, total_steps=TOTAL, theta=0.5)
    forward = lambda x: net(x.to(memory_format=torch.channels_last))  # noqa: E731
    run = Run(net, optimizer, sparsifier, Loop(forward, net, optimizer, case), case)
    run.train(0, STEPS)
    assert_exact(run)
    assert net.stem.weight.is_contiguous(memory_format=torch.channels_last)
    plain = start("convnet", theta=0.5).train(0, STEPS)
    for p, q in zip(net.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_moves_between_memory_formats():
    run = start("convnet").train(0, 4)
    resumed = start("convnet", seed=1)
    resumed.model.to(memory_format=torch.channels_last)
    resumed.load(run.save())
    assert_same(resumed.sparsifier.latent_weights(), run.sparsifier.latent_weights())
    assert_exact(resumed.train(4, 6))


@pytest.mark.parametrize("change", ["transposed", "channels_last later"])
def test_unusual_layouts_are_exact(change):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 6, bias=False))
    if change == "transposed":
        model[2].weight = nn.Parameter(torch.randn(4, 6).t())
    sparsifier, optimizer = attach(model, 0.7)
    if change == "channels_last later":
        model.to(memory_format=torch.channels_last)
    before = model[2].weight.stride()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 3, 3)).square().sum().backward()
        optimizer.step()
        assert zeros(model, "0.weight", "2.weight") == round(0.7 * 132)
        for name, mask in sparsifier.masks().items():
            assert torch.equal(dict(model.named_parameters())[name] != 0, mask)
    assert model[2].weight.stride() == before


def test_a_weight_with_gaps_in_its_memory_is_an_error_that_names_it():
    model = nn.Sequential(nn.Linear(4, 6))
    model[0].weight = nn.Parameter(torch.randn(6, 8)[:, ::2])
    with pytest.raises(ConfigurationError, match=r"\b0\.weight"):
        attach(model)


@pytest.mark.parametrize("cast", ["double", "half", "bfloat16", "to", "to_empty-free cpu"])
def test_casting_after_sparsify_keeps_the_latents(cast):
    """`.to()` replaces the storage of every parameter; the latent weights follow its type."""
    run = start("mlp", "sgd", schedule="constant")
    before = run.sparsifier.latent_weights()
    casts = {
        "double": lambda m: m.double(),
        "half": lambda m: m.half(),
        "bfloat16": lambda m: m.bfloat16(),
        "to": lambda m: m.to(torch.float64),
        "to_empty-free cpu": lambda m: m.to("cpu"),
    }
    casts[cast](run.model)
    run.loop.dtype = dtype = run.model[0].weight.dtype
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.train(0, 1)
    after = run.sparsifier.latent_weights()
    tolerance = torch.finfo(dtype).eps
    for name, w in before.items():
        assert after[name].dtype == dtype
        # Latent values of pruned weights too.
        torch.testing.assert_close(after[name].float(), w, rtol=tolerance, atol=1e-7)
    run.optimizer.param_groups[0]["lr"] = 0.1
    run.train(1, STEPS)
    assert_exact(run)
    assert run.sparsifier.step_count == STEPS


def test_casting_in_mid_training_and_saving_at_once():
    run = start("mlp", "sgd", schedule="constant").train(0, 3)
    run.model.double()
    run.loop.dtype = torch.float64
    resumed = start("mlp", "sgd", schedule="constant", dtype=torch.float64, seed=1)
    resumed.load(run.save())
    assert_same(snapshot(resumed.train(3, 5)), snapshot(run.train(3, 5)))


# --- copies and averages --------------------------------------------------------------------


def test_a_deep_copy_is_an_independent_plain_sparse_model():
    run = start("convnet", theta=0.5).train(0, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = copy.deepcopy(run.model)
    assert_same(copied.state_dict(), run.model.state_dict())
    assert not any(p._backward_hooks for p in copied.parameters())
    before = snapshot(run)
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    Loop(copied, copied, optimizer, run.case).step(0)
    assert_same(snapshot(run), before)
    assert run.case.zeros(copied) < run.zeros()


def test_a_deep_copy_can_be_sparsified_itself():
    run = start("convnet", theta=0.5).train(0, 6)
    copied = copy.deepcopy(run.model)
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    sparsifier = feather.sparsify(copied, optimizer, sparsity=0.9, total_steps=4,
                                  schedule="constant")  # fmt: skip
    Loop(copied, copied, optimizer, run.case).step(0)
    assert run.case.zeros(copied) == round(0.9 * run.case.size)
    assert sparsifier.step_count == 1
    assert run.sparsifier.step_count == 6


def test_a_deep_copy_of_model_and_optimizer_raises_at_its_first_step():
    run = start("convnet", theta=0.5).train(0, 6)
    before = snapshot(run)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    with pytest.raises(StateError, match="Call sparsify"):
        Loop(model, model, optimizer, run.case).step(0)
    assert_same(snapshot(run), before)
    assert run.case.zeros(model) == run.zeros()


def test_a_whole_model_can_be_pickled():
    run = start("convnet", theta=0.5).train(0, 6)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(run.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(loaded.state_dict(), run.model.state_dict())


def test_a_latent_average_is_exactly_sparse_and_is_the_average_of_the_latents():
    run = start("convnet")
    average = feather.LatentAverage(run.sparsifier, decay=0.8)
    expected = run.sparsifier.latent_weights()
    copied = copy.deepcopy(run.model)
    for step in range(STEPS):
        run.train(step, step + 1)
        average.update()
        for name, w in run.sparsifier.latent_weights().items():
            expected[name] = 0.8 * expected[name] + 0.2 * w
        average.copy_to(copied)
        assert run.case.zeros(copied) == round(run.sparsifier.sparsity * run.case.size)
    kept = {n: p != 0 for n, p in run.case.weights(copied).items()}
    k = run.case.zeros(copied)
    magnitude = torch.cat([w.abs().flatten() for w in expected.values()])
    mask = torch.cat([m.flatten() for m in kept.values()])
    assert magnitude[~mask].max() <= magnitude[mask].min()
    tau = magnitude.kthvalue(k).values
    for name, p in run.case.weights(copied).items():
        effective = feather.power_threshold(expected[name], tau)
        torch.testing.assert_close(p.detach(), effective, rtol=1e-4, atol=1e-6)


def test_a_latent_average_without_memory_is_the_model_itself():
    run = start("convnet")
    average = feather.LatentAverage(run.sparsifier, decay=0.0)
    run.train(0, 6)
    average.update()
    copied = copy.deepcopy(run.model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    copied.load_state_dict(run.model.state_dict() | {
        n: torch.zeros_like(p) for n, p in run.case.weights(copied).items()})  # fmt: skip
    average.copy_to(copied)
    for name, p in run.case.weights(copied).items():
        assert torch.equal(p, run.case.weights(run.model)[name])


def test_a_latent_average_takes_the_other_parameters_along():
    """Biases and norms are averaged too; running statistics are those of training."""
    run = start("convnet")
    average = feather.LatentAverage(run.sparsifier, decay=0.5)
    others = [n for n, _ in run.model.named_parameters() if n not in run.case.prunable]
    expected = {n: run.model.get_parameter(n).detach().clone() for n in others}
    for step in range(3):
        run.train(step, step + 1)
        average.update()
        for name in others:
            expected[name] = 0.5 * expected[name] + 0.5 * run.model.get_parameter(name).detach()
    copied = average.copy_to(copy.deepcopy(run.model))
    for name in others:
        torch.testing.assert_close(copied.get_parameter(name).detach(), expected[name])
    assert_same(dict(copied.named_buffers()), dict(run.model.named_buffers()))


def test_a_latent_average_does_not_overwrite_the_model_in_training():
    run = start("mlp").train(0, 6)
    average = feather.LatentAverage(run.sparsifier)
    before = snapshot(run)
    with pytest.raises(ConfigurationError, match="copy"):
        average.copy_to(run.model)
    assert_same(before, snapshot(run))
    for decay in (-0.1, 1.0, 2.0):
        with pytest.raises(ConfigurationError, match="decay"):
            feather.LatentAverage(run.sparsifier, decay=decay)
    other = feather.LatentAverage(start("convnet").sparsifier)
    with pytest.raises(feather.StateError):
        average.load_state_dict(other.state_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_average_never_takes_in_values_that_are_not_finite(value):
    """The next finite values are averaged again, and only the broken ones are left out."""
    run = start("mlp", sparsity=0.5)
    average = feather.LatentAverage(run.sparsifier, decay=0.75)
    run.train(0, 2)
    average.update()
    before = average.state_dict()
    flats = run.sparsifier.step.training.weights.flats
    latent = [flat.clone() for flat in flats]
    with torch.no_grad():
        for flat in flats:
            flat[::3] = value
        run.model[2].bias[1] = value
    average.update()
    after = average.state_dict()
    for old, new, flat in zip(before["latent"], after["latent"], latent, strict=True):
        expected = old.lerp(flat, 0.25)
        expected[::3] = old[::3]
        assert torch.equal(new, expected)
    bias = before["others"]["2.bias"].lerp(run.model[2].bias.detach(), 0.25)
    bias[1] = before["others"]["2.bias"][1]
    assert torch.equal(after["others"]["2.bias"], bias)


def test_an_average_in_half_precision_does_not_overflow():
    model = nn.Linear(4, 4).half()
    with torch.no_grad():
        model.weight.fill_(60000.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.0, total_steps=2)
    average = feather.LatentAverage(sparsifier, decay=0.25)
    with torch.no_grad():
        model.weight.fill_(-60000.0)  # the difference of the two is not finite
    average.update()
    assert all(flat.isfinite().all() for flat in average.state_dict()["latent"])


def test_an_average_does_not_begin_with_values_that_are_not_finite():
    run = start("mlp")
    state = feather.LatentAverage(run.sparsifier).state_dict()
    state["others"]["0.bias"][0] = math.inf
    with pytest.raises(feather.NonFiniteWeightError, match=r"0\.bias"):
        feather.LatentAverage(run.sparsifier).load_state_dict(state)
    with torch.no_grad():
        run.model[0].bias[0] = math.nan
    with pytest.raises(feather.NonFiniteWeightError, match=r"0\.bias"):
        feather.LatentAverage(run.sparsifier)


def test_averaging_leaves_training_alone():
    run, other = start("convnet"), start("convnet")
    average = feather.LatentAverage(run.sparsifier, decay=0.9)
    copied = copy.deepcopy(run.model)
    for step in range(4):
        run.train(step, step + 1)
        other.train(step, step + 1)
        average.update()
        average.copy_to(copied)
    assert_same(snapshot(run), snapshot(other))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: None,
        lambda state: {},
        lambda state: state | {"decay": 2.0},
        lambda state: state | {"decay": "0.9"},
        lambda state: state | {"decay": float("nan")},
        lambda state: state | {"latent": 3},
        lambda state: state | {"latent": [None for _ in state["latent"]]},
        lambda state: state | {"latent": [flat.to("meta") for flat in state["latent"]]},
        lambda state: state | {"latent": [flat.to_sparse() for flat in state["latent"]]},
        lambda state: state | {"others": None},
        lambda state: state | {"others": {name: 1.0 for name in state["others"]}},
        lambda state: state | {"others": {n: v[:1] for n, v in state["others"].items()}},
    ],
)
def test_what_is_no_state_of_an_average_is_an_error_and_changes_nothing(change):
    run = start("mlp").train(0, 2)
    average = feather.LatentAverage(run.sparsifier, decay=0.9)
    before = average.state_dict()
    with pytest.raises(StateError):
        average.load_state_dict(change(average.state_dict()))
    assert_same(average.state_dict(), before)


def test_a_latent_average_resumes():
    def averaged(run, state=None):
        average = feather.LatentAverage(run.sparsifier, decay=0.9)
        if state is not None:
            average.load_state_dict(state)
        return average

    def advance(run, average, start, stop):
        for step in range(start, stop):
            run.train(step, step + 1)
            average.update()

    run = start("mlp")
    average = averaged(run)
    advance(run, average, 0, 3)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    checkpoint = run.save()
    resumed = start("mlp", seed=1).load(checkpoint)
    other = averaged(resumed, torch.load(file, weights_only=True))
    advance(run, average, 3, 6)
    advance(resumed, other, 3, 6)
    one, two = copy.deepcopy(run.model), copy.deepcopy(run.model)
    average.copy_to(one)
    other.copy_to(two)
    assert_same(one.state_dict(), two.state_dict())


# --- which weights are prunable -------------------------------------------------------------


def test_tied_parameters_count_once():
    run = start("tied", schedule="constant")
    assert run.zeros() == round(0.8 * 60)
    assert list(run.sparsifier.masks()) == ["first.weight", "head.weight"]
    run.train(0, 3)
    assert run.model.first.weight is run.model.second.weight
    assert_exact(run)


def test_the_packed_projection_of_attention_is_prunable_and_so_are_separate_ones():
    run = start("attention", schedule="constant")
    assert set(run.sparsifier.masks()) == {
        "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"
    }  # fmt: skip
    separate = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    sparsifier, _ = attach(separate)
    assert set(sparsifier.masks()) == {
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"
    }  # fmt: skip


def test_convolutions_keep_their_arguments():
    """Dilation, groups and padding mode: nothing is wrapped, so nothing can be dropped."""
    run = start("convnet")
    before = [repr(module) for module in run.model.modules()]
    run.train(0, STEPS)
    depth = run.model.depth
    assert (depth.dilation, depth.groups, depth.padding_mode) == ((2, 2), 8, "circular")
    assert [repr(module) for module in run.model.modules()] == before


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, groups=2, padding_mode="reflect", padding=1),
        nn.Conv3d(2, 3, 2),
        nn.ConvTranspose1d(3, 4, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Linear(5, 6),
        nn.Bilinear(3, 4, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_kind_of_layer_with_weights_is_prunable(layer):
    attach(layer)
    assert zeros(layer, "weight") == round(0.5 * layer.weight.numel())
    assert (layer.bias != 0).all()


def test_embeddings_norms_and_biases_are_not_prunable_by_default():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(7, 4),
            "bag": nn.EmbeddingBag(7, 4),
            "batch": nn.BatchNorm2d(4),
            "layer": nn.LayerNorm([4, 4]),
            "group": nn.GroupNorm(2, 4),
            "rms": nn.RMSNorm(4),
            "prelu": nn.PReLU(4),
            "linear": nn.Linear(4, 4),
        }
    )
    model.scale = nn.Parameter(torch.randn(4, 4))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsifier, optimizer = attach(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert list(sparsifier.masks()) == ["linear.weight"]
    for name, p in model.named_parameters():
        if name != "linear.weight":
            assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("method", feather.available_methods())
def test_a_layer_that_is_frozen_for_a_while_may_be_cast_then(method):
    options = {"dense_below": 0} if "asl" in method else {}
    if method == "feather-flops":
        options["costs"] = some_costs
    run = start("convnet", method=method, sparsity=0.35, **options).train(0, 2)
    run.model.head.weight.requires_grad_(False)
    run.train(2, 4)
    run.model.to(torch.float64, memory_format=torch.channels_last)
    run.loop.dtype = torch.float64
    before = run.sparsifier.latent_weights()["head.weight"]
    run.train(4, 6)
    assert torch.equal(before, run.sparsifier.latent_weights()["head.weight"])
    run.model.head.weight.requires_grad_(True)
    run.train(6, TOTAL)
    run.sparsifier.finalize()
    assert run.zeros() == round(0.35 * run.case.size)


def test_gradients_of_a_layer_that_trains_again_are_pulled_back():
    run = start("mlp", theta=0.0, schedule="constant")
    weight, pruned = run.model[2].weight, ~run.sparsifier.masks()["2.weight"]
    weight.requires_grad_(False)
    run.model.double()
    run.sparsifier.masks()  # a check
    weight.requires_grad_(True)
    run.loop.dtype = torch.float64
    run.loop.gradients(0)
    assert (weight.grad[pruned] == 0).all()
    assert (weight.grad[~pruned] != 0).any()


def test_frozen_parameters_are_unchanged():
    case = MODELS["mlp"]
    net = case.make()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    sparsifier = feather.sparsify(net, optimizer, sparsity=0.5, total_steps=4,
                                  schedule="constant")  # fmt: skip
    run = Run(net, optimizer, sparsifier, Loop(net, net, optimizer, case), case).train(0, 3)
    assert torch.equal(net[0].weight, before)
    assert list(sparsifier.masks()) == ["2.weight"]
    assert zeros(net, "2.weight") == 24
    net[0].weight.requires_grad_(False)
    run.load(run.save())
    sparsifier.finalize()


def test_a_frozen_parameter_needs_no_optimizer():
    case = MODELS["mlp"]
    net = case.make()
    net[0].weight.requires_grad_(False)
    frozen = net[0].weight.clone()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    sparsifier = feather.sparsify(net, optimizer, sparsity=0.5, total_steps=4)
    Run(net, optimizer, sparsifier, Loop(net, net, optimizer, case), case).train(0, 4)
    assert list(sparsifier.finalize().state_dict()) == list(case.make().state_dict())
    assert zeros(net, "2.weight") == 24
    assert torch.equal(net[0].weight, frozen)


CONVNET = ["stem.weight", "depth.weight", "point.weight", "head.weight"]
FILTERS = {
    "exclude a glob": ({"exclude": "stem.*"}, CONVNET[1:]),
    "exclude a name": ({"exclude": "head.weight"}, CONVNET[:3]),
    "exclude a regex": ({"exclude": re.compile(r"^(stem|head)\.")}, CONVNET[1:3]),
    "exclude a type": ({"exclude": nn.Linear}, CONVNET[:3]),
    "exclude a callable": (
        {"exclude": lambda module, name: getattr(module, "groups", 1) > 1},
        ["stem.weight", "point.weight", "head.weight"],
    ),
    "exclude several": ({"exclude": ["stem.*", nn.Linear]}, CONVNET[1:3]),
    "include a glob": ({"include": "*o*.weight"}, ["norm.weight", "point.weight"]),
    "include a regex": ({"include": re.compile(r"^(stem|point)\.weight$")},
                        ["stem.weight", "point.weight"]),
    "include a type": ({"include": nn.Conv2d}, CONVNET[:3]),
    "include a callable": (
        {"include": lambda module, name: isinstance(module, nn.Linear) and name.endswith("bias")},
        ["head.bias"],
    ),
    "include and exclude": ({"include": nn.Conv2d, "exclude": "point.*"}, CONVNET[:2]),
    "include several": ({"include": ("head.*", re.compile("^stem"))},
                        ["stem.weight", "head.weight", "head.bias"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILTERS)
def test_include_and_exclude(kind):
    filters, expected = FILTERS[kind]
    net = MODELS["convnet"].make()
    with torch.no_grad():  # nothing else may be zero
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    sparsifier, _ = attach(net, **filters)
    assert list(sparsifier.masks()) == expected
    for name, p in net.named_parameters():
        assert name in expected or (p != 0).all(), name
    size = sum(p.numel() for n, p in net.named_parameters() if n in expected)
    assert zeros(net, *expected) == round(0.5 * size)


@pytest.mark.parametrize("way", ["cast", "cast at the end", "state"])
def test_small_latent_weights_do_not_vanish_in_a_narrower_type(way):
    """float16 has no number below 6e-8, but a kept weight is not 0."""
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    model.weight.data *= 1e-8
    sparsifier, optimizer = attach(model)
    states = model.state_dict(), optimizer.state_dict()
    if way == "state":
        model = nn.Linear(16, 16).half()
        sparsifier, optimizer = attach(model)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    else:
        model.half()
    if way != "cast at the end":
        optimizer.step()  # without gradients
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model was modified
        sparsifier.finalize(force=True)
    assert model.weight.dtype == torch.float16
    assert int((model.weight == 0).sum()) == 128


# --- weights that are computed --------------------------------------------------------------


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "parametrized weight_norm": weight_norm,
    "weight_norm": old_weight_norm,
    "parametrized spectral_norm": spectral_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(2, 3, 3)], ids=["linear", "conv"])
def test_computed_weights_are_an_error_unless_excluded(layer, kind):
    model = nn.Sequential(nn.Linear(4, 4), COMPUTED[kind](copy.deepcopy(layer)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=r"\b1\.weight"):
        attach(model)
    assert_same(model.state_dict(), before)
    sparsifier, _ = attach(model, exclude="1.*")
    assert list(sparsifier.masks()) == ["0.weight"]


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("then", ["step", "sparsity", "report", "finalize", "state_dict"])
def test_weights_that_are_computed_later_are_an_error_until_it_is_undone(then, kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsifier, optimizer = attach(model, total_steps=1)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    COMPUTED[kind](model[1])
    calls = {
        "step": optimizer.step,
        "sparsity": lambda: sparsifier.sparsity,
        "report": sparsifier.report,
        "finalize": sparsifier.finalize,
        "state_dict": optimizer.state_dict,
    }
    with pytest.raises(StateError, match=r"^1\.weight is computed .*exclude=\['1\.weight'\]"):
        calls[then]()
    if kind == "prune":
        prune.remove(model[1], "weight")
        if then != "finalize":
            calls[then]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # prune wrote zeros
            sparsifier.finalize()
        assert feather.sparsity(model) == 0.5


def test_a_tied_weight_that_is_computed_later_in_its_second_layer_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    sparsifier, optimizer = attach(model)
    prune.random_unstructured(model[1], "weight", 0.5)
    with pytest.raises(StateError, match=r"^0\.weight is computed"):
        optimizer.step()
    prune.remove(model[1], "weight")
    model[1] = nn.Linear(4, 4)  # no longer tied: each layer holds its own weight
    optimizer.step()
    assert sparsifier.sparsity == 0.5


@pytest.mark.parametrize("lazy", [nn.LazyLinear(4), nn.LazyConv2d(3, 3)], ids=["linear", "conv"])
def test_lazy_modules_without_a_shape_are_an_error(lazy):
    model = nn.Sequential(nn.Linear(4, 4), lazy)
    with pytest.raises(ConfigurationError, match=r"\b1\.weight"):
        attach(model)
    lazy(torch.randn(2, 4) if isinstance(lazy, nn.LazyLinear) else torch.randn(1, 2, 5, 5))
    sparsifier, _ = attach(model)
    assert list(sparsifier.masks()) == ["0.weight", "1.weight"]


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_keys_types_and_modules_of_the_model_never_change(model):
    run = start(model)
    plain = run.case.make()
    for _ in range(3):
        assert list(run.model.state_dict()) == list(plain.state_dict())
        assert list(dict(run.model.named_modules())) == list(dict(plain.named_modules()))
        assert [type(m) for m in run.model.modules()] == [type(m) for m in plain.modules()]
        assert [type(p) for p in run.model.parameters()] == [type(p) for p in plain.parameters()]
        run.train(0, 2)


@pytest.mark.parametrize("model", ["convnet", "tied", "attention"])
def test_safetensors_save_model_works_while_training(model, tmp_path):
    from safetensors.torch import load_model, save_model

    run = start(model).train(0, 6)
    save_model(run.model, str(tmp_path / "model.safetensors"))
    plain = run.case.make(5)
    load_model(plain, str(tmp_path / "model.safetensors"))
    assert_same(plain.state_dict(), run.model.state_dict())
    assert run.case.zeros(plain) == run.zeros()


def test_a_saved_layer_takes_only_its_own_space():
    """No parameter is a view into a larger storage."""
    run = start("convnet").train(0, 3)
    for p in run.model.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    for w in run.sparsifier.latent_weights().values():
        assert w.untyped_storage().nbytes() == w.numel() * w.element_size()

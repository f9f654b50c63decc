"""Patterns: n of m neighbours, and blocks; the references are plain autograd."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import torch_feather as feather
from torch_feather import ConfigurationError
from torch_feather.allocation import FlopsBiased, Global
from torch_feather.methods import METHODS as BY_NAME
from torch_feather.methods import method_options
from torch_feather.patterns import NM, Block, Pattern, make_pattern

from . import methods, models, test_capture, test_trajectory
from .harness import RECIPES, STEPS, TOTAL, Run, assert_exact, assert_same, snapshot, start
from .methods import GlobalThreshold, MethodCase, smallest
from .models import CLASSES, ModelCase
from .test_capture import as_on_a_device  # noqa: F401 - a fixture
from .test_exactness import DTYPES, scalars


def even() -> nn.Module:
    """Both dimensions of every weight are multiples of 4."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


EVEN = ModelCase("even", even, {"0.weight": 288, "3.weight": 64, "6.weight": 32},
                 lambda generator: torch.randn(8, 4, 6, 6, generator=generator))  # fmt: skip


# --- the references -------------------------------------------------------------------------


def straight_through(w: Tensor, effective: Tensor, kept: Tensor, theta: float) -> Tensor:
    """`effective` on kept weights, 0 elsewhere; dL/dw = dL/du, times theta where pruned."""
    passed = torch.where(kept, w, theta * w)
    return passed + (torch.where(kept, effective, 0.0) - passed).detach()


def power(x: Tensor, tau: Tensor, p: float) -> Tensor:
    """T_p(x; tau) of numbers x > 0 above their thresholds."""
    return x if p == math.inf else (x**p - tau**p).clamp(min=0) ** (1 / p)


class NMThreshold(GlobalThreshold):
    """Of the m - n smallest of each group of m inputs, those that are smallest in the network."""

    def __init__(self, *args, pattern: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.n, self.m = map(int, pattern.split(":"))

    def groups(self, w: Tensor) -> Tensor:
        """Flat indices of each group."""
        return torch.arange(w.numel()).view(w.shape).movedim(1, -1).reshape(-1, self.m)

    def effective(self) -> dict[str, Tensor]:
        sizes = [w.detach().abs().flatten() for w in self.latent.values()]
        candidates = []
        for i, (w, size) in enumerate(zip(self.latent.values(), sizes, strict=True)):
            for group in self.groups(w):
                first = group[size[group].sort(stable=True).indices[: self.m - self.n]]
                candidates += [(float(size[j]), i, int(j)) for j in first]
        pruned = sorted(candidates)[: round(self.sparsity * self.size)]
        found = {}
        for i, (name, w) in enumerate(self.latent.items()):
            kept = torch.ones(w.numel(), dtype=torch.bool)
            kept[[j for _, at, j in pruned if at == i]] = False
            groups, tau = self.groups(w), torch.zeros_like(sizes[i])
            tau[groups] = torch.where(kept, 0.0, sizes[i])[groups].amax(1, keepdim=True)
            effective = w.sign() * power(sizes[i], tau, self.p).view(w.shape)
            found[name] = straight_through(w, effective, kept.view(w.shape), self.theta)
        return found


class BlockThreshold(GlobalThreshold):
    """u = w T(s) / s for each block, with s the root mean square of its weights."""

    def __init__(self, *args, pattern: str, layered: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.block, self.layered = tuple(map(int, pattern.split("x"))), layered

    @property
    def sparsity(self) -> float:
        blocks = self.size // math.prod(self.block)
        return round(super().sparsity * blocks) / blocks

    def split(self, w: Tensor) -> Tensor:
        """Of shape (outputs / rows, rows, inputs / columns, columns, positions)."""
        (r, c), (out, into, *rest) = self.block, w.shape
        return w.reshape(out // r, r, into // c, c, math.prod(rest))

    def effective(self) -> dict[str, Tensor]:
        with torch.no_grad():
            scores = [self.split(w).square().mean((1, 3)).sqrt() for w in self.latent.values()]
        if self.layered:
            target = super().sparsity
            ends = [sum(s.numel() for s in scores[: i + 1]) for i in range(len(scores))]
            ends = [0, *[round(target * end) for end in ends]]
            found_cutoffs = [
                smallest([s], b - a) for s, a, b in zip(scores, ends, ends[1:], strict=False)
            ]
            masks, taus = [mask for (mask,), _ in found_cutoffs], [tau for _, tau in found_cutoffs]
        else:
            k = round(self.sparsity * sum(s.numel() for s in scores))
            masks, tau = smallest(scores, k)
            taus = [tau] * len(masks)
        found = {}
        for (name, w), s, mask, tau in zip(self.latent.items(), scores, masks, taus, strict=True):
            factor = (power(s, tau, self.p) / s).unsqueeze(1).unsqueeze(3)
            kept = mask.unsqueeze(1).unsqueeze(3).expand_as(self.split(w))
            effective = self.split(w) * factor
            found[name] = straight_through(self.split(w), effective, kept, self.theta).view(w.shape)
        return found


CASES = {
    case.name: case
    for case in [
        MethodCase("2:4", "feather", NMThreshold, 0.5, {"pattern": "2:4"}),
        MethodCase("1:4-theta", "feather", NMThreshold, 0.75, {"pattern": "1:4", "theta": 0.3}),
        MethodCase("2:4-soft", "soft-ste", NMThreshold, 0.5, {"pattern": "2:4"},
                   {"pattern": "2:4", "p": 1}),
        MethodCase("2:4-hard", "hard-ste", NMThreshold, 0.5, {"pattern": "2:4"},
                   {"pattern": "2:4", "p": math.inf}),
        MethodCase("2:4-gmp", "gmp", NMThreshold, 0.5, {"pattern": "2:4", "allocation": "global"},
                   {"pattern": "2:4", "p": math.inf, "theta": 0.0}),
        MethodCase("4x4", "feather", BlockThreshold, 0.75, {"pattern": "4x4"}),
        MethodCase("2x1-theta", "feather", BlockThreshold, 0.75, {"pattern": "2x1", "theta": 0.3}),
        MethodCase("1x4-soft", "soft-ste", BlockThreshold, 0.75, {"pattern": "1x4"},
                   {"pattern": "1x4", "p": 1}),
        MethodCase("4x1-gmp", "gmp", BlockThreshold, 0.75,
                   {"pattern": "4x1", "allocation": "uniform"},
                   {"pattern": "4x1", "layered": True, "p": math.inf, "theta": 0.0}),
    ]
}  # fmt: skip
FEW = ["2:4", "2x1-theta"]


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """Add this network and these methods to the tables."""
    monkeypatch.setitem(models.MODELS, "even", EVEN)
    for name, case in CASES.items():
        monkeypatch.setitem(methods.METHODS, name, case)


def begin(name: str, **changes) -> Run:
    case = CASES[name]
    return start("even", method=case.method, sparsity=case.sparsity, **case.options, **changes)


# --- properties of every method -------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_trajectory_is_that_of_autograd(case):
    test_trajectory.compare(case, model="even")


@pytest.mark.parametrize("recipe", ["closure + clip + accumulate", "autocast", "scaler"])
@pytest.mark.parametrize("case", FEW)
def test_the_trajectory_is_that_of_autograd_in_any_loop(case, recipe):
    test_trajectory.compare(case, model="even", recipe=RECIPES[recipe],
                            **test_trajectory.precision(RECIPES[recipe]))  # fmt: skip


@pytest.mark.parametrize("case", FEW)
def test_a_compiled_model_takes_the_same_steps(case):
    test_trajectory.compare(case, model="even",
                            prepare=lambda m: torch.compile(m, backend="aot_eager"))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bitwise_identical(case, dtype):
    whole = begin(case, dtype=dtype).train(0, 4)
    checkpoint = whole.save()
    assert_exact(whole.train(4, STEPS))
    resumed = begin(case, dtype=dtype, seed=3).load(checkpoint).train(4, STEPS)
    assert_same(snapshot(resumed), snapshot(whole))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("as_on_a_device")
def test_steps_can_be_captured(case):
    """As in a CUDA graph: the host reads nothing, and memory is fixed."""
    hooked = test_capture.CapturedLoop(case, "even").train(0, 12).end()
    loop = test_capture.CapturedLoop(case, "even").train(0, 2)
    loop.feed(2)
    with test_capture.Tape() as tape:
        loop.step()
    assert_same(loop.train(3, 12, tape.replay).end(), hooked)


def test_casting_keeps_the_pattern():
    run = begin("2:4").train(0, TOTAL)
    run.model.double()
    run.loop.dtype = torch.float64
    assert_exact(run.train(TOTAL, TOTAL + 2))
    assert all(of_each(w, 2, 4) for w in run.case.weights(run.model).values())


# --- the patterns ---------------------------------------------------------------------------


def of_each(w: Tensor, n: int, m: int) -> bool:
    """Whether n of each m neighbours along dimension 1 are not 0."""
    return bool(((w.detach() != 0).movedim(1, -1).reshape(-1, m).sum(1) == n).all())


def whole(w: Tensor, rows: int, columns: int) -> bool:
    """Whether all of a block are 0, or none."""
    out, into, *rest = w.shape
    kept = (w.detach() != 0).view(out // rows, rows, into // columns, columns, *rest)
    return torch.equal(kept.amax((1, 3)), kept.amin((1, 3)))


@pytest.mark.parametrize("method", [m for m in BY_NAME if "pattern" in method_options(m)])
@pytest.mark.parametrize(
    ("pattern", "sparsity", "holds"),
    [
        ("2:4", 0.5, lambda w: of_each(w, 2, 4)),
        (NM(1, 2), 0.5, lambda w: of_each(w, 1, 2)),
        ("3:4", 0.25, lambda w: of_each(w, 3, 4)),
        ("4x4", 0.7, lambda w: whole(w, 4, 4)),
        (Block(4, 1), 0.6, lambda w: whole(w, 4, 1)),
        ("1x2", 0.9, lambda w: whole(w, 1, 2)),
    ],
    ids=["2:4", "1:2", "3:4", "4x4", "4x1", "1x2"],  # two processes have to agree on them
)
def test_every_method_that_takes_a_pattern_ends_in_it_exactly(method, pattern, sparsity, holds):
    run = start("even", method=method, pattern=pattern, sparsity=sparsity, allocation="global")
    unit = (
        1 if isinstance(make_pattern(pattern), NM) else math.prod(make_pattern(pattern).multiples)
    )
    seen = []
    for step in range(TOTAL + 2):
        seen.append(run.zeros())
        assert_exact(run)
        if step >= TOTAL // 2:
            assert all(holds(w) for w in run.case.weights(run.model).values())
            assert run.zeros() == round(sparsity * 384 / unit) * unit
            assert run.sparsifier.at_target
        run.train(step, step + 1)
    assert seen == sorted(seen)
    run.sparsifier.finalize()
    assert all(holds(w) for w in run.case.weights(run.model).values())


def test_patterns_have_the_options_of_methods():
    takes = {name for name in BY_NAME if "pattern" in method_options(name)}
    assert takes == {"feather", "feather-ham", "hard-ste", "soft-ste", "gmp", "feather-gmp"}


@pytest.mark.parametrize("operator", ["feather", "hard-ste", "soft-ste"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 8), Block(2, 4), Block(1, 8)], ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_the_pattern_holds_whatever_the_weights(pattern: Pattern, dtype, operator, data):
    model = nn.Linear(16, 4, bias=False, dtype=dtype)
    pool = data.draw(st.lists(scalars(dtype), min_size=1, max_size=64))
    with torch.no_grad():
        values = torch.tensor([pool[i % len(pool)] for i in range(64)], dtype=torch.float64)
        model.weight.copy_(values.reshape(4, 16))
    w = model.weight.detach().clone()
    nm = isinstance(pattern, NM)
    target = 1 - pattern.n / pattern.m if nm else 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = feather.sparsify(
            model, torch.optim.SGD(model.parameters(), lr=0.1), operator, sparsity=target,
            total_steps=1, schedule="constant", pattern=pattern,
        )  # fmt: skip
    [mask], u = sparsifier.masks().values(), model.weight.detach()
    assert int((~mask).sum()) == round(sparsifier.target * 64) == pattern.zeros(target, 64)
    magnitudes = w.abs().double()
    if nm:
        assert of_each(mask, pattern.n, pattern.m)
        groups, kept = magnitudes.view(-1, pattern.m), mask.view(-1, pattern.m)
        least = groups.masked_fill(~kept, torch.inf).amin(1)
        assert (groups.masked_fill(kept, 0).amax(1) <= least).all()
    else:
        assert whole(mask, *pattern.multiples)
    assert torch.equal(u != 0, mask & (w != 0))
    assert torch.equal(u.sign(), torch.where(mask, w.sign(), 0))
    assert (u.abs() <= w.abs()).all()
    assert torch.isfinite(u).all()


def test_of_equal_neighbours_the_first_are_pruned():
    model = nn.Linear(8, 2, bias=False)
    nn.init.constant_(model.weight, 0.3)
    feather.sparsify(model, torch.optim.SGD(model.parameters(), 0.1), sparsity=0.5, total_steps=1,
                     schedule="constant", pattern="2:4")  # fmt: skip
    assert torch.equal(model.weight != 0, torch.tensor([False, False, True, True]).repeat(2, 2))


def test_zeros_in_a_kept_block_get_their_gradient():
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight[0, 0] = 0.0
        layer.weight[2:, 2:] *= 0.01
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.warns(feather.FeatherWarning, match="1 latent weights that should be kept"):
        sparsifier = feather.sparsify(layer, optimizer, "gmp", sparsity=0.25, total_steps=1,
                                      schedule="constant", pattern="2x2")  # fmt: skip
    layer(torch.ones(1, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, sparsifier.masks()["weight"].float())


def test_soft_blocks_are_the_proximal_step_of_the_group_lasso():
    """w (1 - t / |w|) for |w| > t: tau is a root mean square, t the norm of as many weights."""
    model = nn.Linear(8, 8, bias=False, dtype=torch.float64)
    w = model.weight.detach().clone()
    sparsifier = feather.sparsify(
        model, torch.optim.SGD(model.parameters(), 0.1), "soft-ste", sparsity=0.5, total_steps=1,
        schedule="constant", pattern="4x4",
    )  # fmt: skip
    t = 4 * float(sparsifier.thresholds()["weight"])
    norm = w.view(2, 4, 2, 4).norm(dim=(1, 3), keepdim=True)
    expected = w.view(2, 4, 2, 4) * (1 - t / norm).clamp(min=0)
    torch.testing.assert_close(model.weight.detach(), expected.view(8, 8))


def test_a_pattern_is_independent_of_the_memory_format():
    """Channels-last weights are pruned like contiguous ones."""
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = EVEN.make().to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        feather.sparsify(model, optimizer, sparsity=0.5, total_steps=4, schedule="constant",
                         pattern="2:4")  # fmt: skip
        runs.append([p.detach().contiguous() for p in model.parameters()])
    assert_same(*runs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_torch_packs_2_of_4_without_loss(dtype):
    """The compressed form that `to_sparse_semi_structured` makes holds every weight."""
    model = nn.Linear(128, 64, bias=False).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1, schedule="constant",
                     pattern="2:4")  # fmt: skip
    w = model.weight.detach()
    # float32 is packed in pairs, 1:2, on hardware; here as 2:4 of its upper half.
    w = w.bfloat16() if dtype == torch.float32 else w
    values, meta = sparse_semi_structured_from_dense_cutlass(w)
    assert values.shape == (64, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), w)


@pytest.mark.gpu
def test_torch_multiplies_2_of_4():
    model = nn.Linear(128, 128, bias=False).half().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1, schedule="constant",
                     pattern="2:4").finalize()  # fmt: skip
    x = torch.randn(128, 128).half().cuda()
    expected = model(x)
    model.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(model.weight))
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


# --- combinations of patterns ---------------------------------------------------------------


def test_blocks_meet_the_targets_of_groups_and_of_all_parameters():
    run = start("even", pattern="4x1", sparsity={"0.*": 0.9, "*": 0.5}).train(0, TOTAL)
    zeros = [int((w == 0).sum()) for w in run.case.weights(run.model).values()]
    assert zeros[0] == round(0.9 * 72) * 4
    assert zeros[1] + zeros[2] == round(0.5 * 24) * 4
    run = start("even", pattern="4x1", sparsity=0.8, count="all").train(0, TOTAL)
    every = sum(p.numel() for p in run.model.parameters())
    assert run.zeros() == round(0.8 * every / 4) * 4


@pytest.mark.parametrize("allocation", ["erk", "sigma", "uniform", Global(min_density=0.1),
                                        FlopsBiased(1.0, costs=methods.some_costs(EVEN))],
                         ids=str)  # fmt: skip
def test_blocks_take_every_allocation(allocation):
    run = start("even", pattern="1x4", sparsity=0.75, allocation=allocation).train(0, TOTAL)
    assert run.zeros() == 288
    assert all(whole(w, 1, 4) for w in run.case.weights(run.model).values())


@pytest.mark.parametrize("pattern", ["2:4", "2x2"])
def test_an_average_of_the_latents_has_the_pattern(pattern):
    run = start("even", pattern=pattern, sparsity=0.5)
    average = feather.LatentAverage(run.sparsifier, decay=0.5)
    for step in range(TOTAL):
        run.train(step, step + 1)
        average.update()
    copied = average.copy_to(EVEN.make())
    holds: Callable[[Tensor], bool] = (
        (lambda w: of_each(w, 2, 4)) if pattern == "2:4" else (lambda w: whole(w, 2, 2))
    )
    assert all(holds(w) for w in EVEN.weights(copied).values())
    assert EVEN.zeros(copied) == 192


@pytest.mark.parametrize("case", FEW)
def test_a_model_that_has_the_pattern_starts_unchanged(case):
    run = begin(case, schedule="constant")
    net = run.sparsifier.finalize()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = feather.sparsify(net, optimizer, sparsity=CASES[case].sparsity, total_steps=4,
                                  **CASES[case].options)  # fmt: skip
    assert_same([p.detach() for p in net.parameters()], before)
    assert sparsifier.sparsity == sparsifier.target


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("even", {"pattern": "2:4", "sparsity": 0.6}, r"exactly 0\.5.*sparsity=0\.5"),
        ("even", {"pattern": "2:4", "sparsity": {"0.*": 0.5, "*": 0.7}}, r"exactly 0\.5"),
        ("even", {"pattern": "2:4", "sparsity": 0.5, "count": "all"}, r"exactly 0\.5"),
        ("convnet", {"pattern": "2:4", "sparsity": 0.5},
         r"stem\.weight \(8, 3, 3, 3\).*exclude=\['stem\.weight', 'depth\.weight', 'head\.weight'"),
        ("convnet", {"pattern": "4x4", "sparsity": 0.5}, r"dimension 0 a multiple of 4.*stem"),
        ("even", {"pattern": "2:4", "sparsity": 0.5, "allocation": "erk"}, "ERK.*'uniform'"),
        ("even", {"pattern": "2:4", "sparsity": {"*": 0.5}, "allocation": "erk"}, "ERK.*'uniform'"),
        ("even", {"pattern": "2:4", "sparsity": 0.5, "method": "gmp"}, "dense_first"),
        ("even", {"pattern": "2:4", "sparsity": 0.5, "min_density": 0.7}, "min_density"),
        ("even", {"pattern": "4:4", "sparsity": 0.5}, "4:4"),
        ("even", {"pattern": "0x4", "sparsity": 0.5}, "0x4"),
        ("even", {"pattern": 124, "sparsity": 0.5}, "quote it in YAML.*124"),
        ("even", {"pattern": "2-4", "sparsity": 0.5}, "'2-4'"),
        ("mlp", {"pattern": "1x2", "sparsity": 0.5, "include": "*"}, r"0\.bias \(12,\)"),
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_pattern_is_an_error(model, settings, words):
    with pytest.raises(ConfigurationError, match=words):
        start(model, **settings)


def test_checkpoints_of_different_patterns_differ():
    run = start("even", pattern="2:4", sparsity=0.5)
    state = start("even", sparsity=0.5).train(0, 2).sparsifier.state_dict()
    with pytest.raises(feather.StateError, match="method"):
        run.sparsifier.load_state_dict(state)


@pytest.mark.parametrize(
    ("sparsity", "pattern"),
    [(0.5, {"pattern": "2:4"}), ({"0.*": 0.25, "*": 0.75}, {})],
    ids=["2:4", "groups"],
)
def test_as_many_zeros_at_invalid_positions_are_pruned_again(sparsity, pattern):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, "hard-ste", sparsity=sparsity, total_steps=1, schedule="constant",
        **pattern,
    )  # fmt: skip
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for layer in model:
            layer.weight.normal_()[:, :32] = 0
    with pytest.warns(feather.errors.FeatherWarning, match="4096 zeros, at invalid positions"):
        sparsifier.finalize()
    if pattern:
        assert all(of_each(layer.weight, 2, 4) for layer in model)

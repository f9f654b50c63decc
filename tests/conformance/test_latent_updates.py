"""Latent updates: the readable form and the fast one, and the steps that change latent weights.

`test_trajectory.py` compares `feather-ham` with its autograd form; here are the cases around it.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import torch_feather as feather
from torch_feather import devices
from torch_feather.errors import ConfigurationError
from torch_feather.latent_updates import HAM, LatentUpdate
from torch_feather.weights import compiled
from torch_feather.weights.exchange import read_latent
from torch_feather.weights.latent import DEVICE_BLOCK, LatentWeights
from torch_feather.weights.ranges import RANGE
from torch_feather.weights.updates import PendingUpdate

from .harness import TOTAL, assert_same, snapshot, start
from .models import MODELS

UPDATE = HAM(alpha=20.0, beta=0.1)
SETTINGS = {"sparsity": 0.8, "total_steps": TOTAL}
SHAPES = ((7, 3), (1,), (RANGE // 64 + 3, 64), (6, 4, 3, 3))
CLOSE = {
    torch.float64: {"rtol": 1e-14, "atol": 0.0},
    torch.float32: {"rtol": 1e-6, "atol": 0.0},
    torch.bfloat16: {"rtol": 1e-2, "atol": 0.0},
}


@dataclass(frozen=True)
class Decay(LatentUpdate):
    """An update without a fast form."""

    rate: float = 0.5

    def __call__(self, w, gradient, lr):
        return w * (1 - self.rate * lr) - lr * gradient


def with_special(shape, seed, dtype=torch.float32):
    """Random numbers, zeros of both signs, NaN and infinities among them."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40])
    found.view(-1)[seed : 12 * 20 + seed : 20] = special.repeat(2).to(dtype)
    return found


# --- the readable form and the fast one -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("update", [UPDATE, HAM(20.0, 0.0), Decay()])
def test_both_forms_agree(update, dtype):
    w, g = with_special(999, 0, dtype), with_special(999, 3, dtype)
    w[500], g[500] = 1.0, torch.inf
    found = w.clone()
    update.write(found.numpy(), g.numpy(), 0.3)
    expected = update(w, g, 0.3)
    # 0 times infinity: a weight that is 0 stays it in the fast form.
    same = ~((w == 0) & g.isinf())
    assert_close(found[same], expected[same], equal_nan=True, **CLOSE[dtype])


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_a_weight_changes_alike_wherever_it_lies(size):
    """Otherwise one process and several, or ranges of other sizes, would differ."""
    w, g = torch.randn(2 * size), torch.randn(2 * size)
    whole = w.clone()
    UPDATE.write(whole.numpy(), g.numpy(), 0.1)
    for start_at in range(0, size, max(size // 5, 1)):
        part = w.clone()[start_at : start_at + size]
        UPDATE.write(part.numpy(), g[start_at : start_at + size].numpy(), 0.1)
        assert torch.equal(part, whole[start_at : start_at + size])


@pytest.mark.parametrize("fast", [False, True])
def test_the_exponent_of_ham_is_bounded(fast):
    w, g = torch.ones(2), torch.tensor([1e9, -1e9])
    if fast:
        HAM(200.0, 0.0).write(w.numpy(), g.numpy(), 1.0)
    else:
        w = HAM(200.0, 0.0)(w, g, 1.0)
    assert_close(w, torch.exp(torch.tensor([-5.0, 5.0])), rtol=5e-7, atol=0.0)


@pytest.mark.parametrize("fast", [False, True])
def test_ham_keeps_zeros_signs_and_what_has_no_gradient(fast):
    w, g = torch.randn(1000), 1e3 * torch.randn(1000)
    w[:10], w[10:20], g[500:] = 0.0, -0.0, 0.0
    found = w.clone()
    if fast:
        HAM(200.0, 0.0).write(found.numpy(), g.numpy(), 1.0)
    else:
        found = HAM(200.0, 0.0)(w, g, 1.0)
    assert torch.equal(found == 0, w == 0)
    assert torch.equal(found.signbit(), w.signbit())
    assert torch.equal(found[500:], w[500:])
    assert (found[20:500] != w[20:500]).all()


@pytest.mark.parametrize(
    "options", [{"alpha": -1.0}, {"beta": float("nan")}, {"alpha": float("inf")}, {"beta": "1"}]
)
def test_invalid_numbers_are_errors(options):
    with pytest.raises(ConfigurationError, match="must be a number >= 0"):
        HAM(**options)


# --- the pass over the weights --------------------------------------------------------------


@pytest.fixture(params=["plain", "compiled", "some", "device"])
def form(request, monkeypatch):
    """How latent weights are read: all by one of two forms, a part, or as on a device."""
    if request.param != "compiled":
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    elif compiled.kernels() is None:
        pytest.skip("llvmlite is not installed")
    if request.param == "device":
        monkeypatch.setattr(devices, "synchronizes", lambda _: True)
    return request.param


@pytest.mark.parametrize("taken", [True, torch.tensor(True)], ids=["bool", "tensor"])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64, torch.bfloat16]], ids=str)
def test_a_pass_updates_each_tensor_by_its_own_gradient_and_rate(form, dtypes, taken):
    typed = [(shape, dtypes[i % len(dtypes)]) for i, shape in enumerate(SHAPES)]
    parameters = [torch.randn(shape, dtype=torch.float64).to(kind) for shape, kind in typed]
    parameters[3] = parameters[3].to(memory_format=torch.channels_last)
    weights = LatentWeights([torch.zeros_like(p) for p in parameters])
    gradients = [torch.randn_like(p) / 30 for p in parameters]
    gradients[0] = None
    gradients[3] = gradients[3].contiguous()  # another layout than the weights
    rates = [0.1, 0.2, torch.tensor(0.3, dtype=torch.float64), 0.2]
    which = [0, 2, 3] if form == "some" else range(4)
    pending = PendingUpdate(UPDATE, gradients, rates, taken)
    versions = [flat._version for flat in weights.flats]
    read_latent(weights, list(which), [parameters[i] for i in which], pending)
    assert all(a != flat._version for a, flat in zip(versions, weights.flats, strict=True))
    for i, p in enumerate(parameters):
        expected = p if i in which else torch.zeros_like(p)
        if gradients[i] is not None and i in which:
            wide = p.to(weights.wide)
            exponent = wide.sign() * gradients[i].to(wide) * 20 + 0.1
            expected = (wide * (-float(rates[i]) * exponent).exp()).to(p.dtype)
        assert_close(weights.views[i], expected, **CLOSE[p.dtype])


@pytest.mark.parametrize("taken", [False, torch.tensor(False)], ids=["bool", "tensor"])
def test_a_pass_of_a_skipped_step_changes_nothing(form, taken):
    parameters = [torch.randn(shape) for shape in SHAPES]
    weights = LatentWeights([torch.zeros_like(p) for p in parameters])
    gradients = [torch.full_like(p, torch.nan) for p in parameters]
    pending = PendingUpdate(UPDATE, gradients, [0.1] * len(SHAPES), taken)
    read_latent(weights, range(len(SHAPES)), parameters, pending)
    for view, p in zip(weights.views, parameters, strict=True):
        assert torch.equal(view, p)


def test_an_update_of_a_part_is_a_change_that_candidates_notice():
    weights = LatentWeights([torch.ones(2), torch.ones(3)])
    version = weights.flats[0]._version
    PendingUpdate(UPDATE, [torch.ones(2), None], [0.1, 0.1], True).apply(weights, [0, 1])
    assert weights.flats[0]._version > version
    assert torch.equal(weights.views[1], torch.ones(3))


def test_a_large_tensor_on_a_device_is_updated_in_pieces(monkeypatch):
    monkeypatch.setattr(devices, "synchronizes", lambda _: True)
    monkeypatch.setattr("torch_feather.weights.updates.DEVICE_BLOCK", 1000)
    sizes = []

    class Recorded(HAM):
        def __call__(self, w, gradient, lr):
            sizes.append(w.numel())
            return super().__call__(w, gradient, lr)

    p, g = torch.randn(37, 100), torch.randn(37, 100)
    weights = LatentWeights([p])
    PendingUpdate(Recorded(1.0, 0.0), [g], [0.1], True).apply(weights, [0])
    assert sizes == [1000, 1000, 1000, 700]
    assert DEVICE_BLOCK > 1000
    assert_close(weights.views[0], HAM(1.0, 0.0)(p, g, 0.1))


def test_all_forms_on_a_cpu_have_the_same_bits(monkeypatch):
    """The selection after it, too, which reads what the pass has collected."""

    def train():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = feather.sparsify(model, optimizer, "feather-ham", sparsity=0.9, total_steps=8)
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.randn(16, 300)).square().mean().backward()
            optimizer.step()
        return model.state_dict(), sparsifier.latent_weights()

    if compiled.kernels() is None:
        pytest.skip("llvmlite is not installed")
    expected = train()
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    assert_same(train(), expected)


# --- steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("update", [UPDATE, Decay()], ids=["fast", "plain"])
def test_the_update_uses_the_learning_rate_of_the_weights_own_group(update, pattern):
    case = MODELS["mlp"]
    net = case.make(0, torch.float64)
    groups = [{"params": [p], "lr": 0.02 * (i + 1)} for i, p in enumerate(net.parameters())]
    optimizer = torch.optim.SGD(groups)
    method = feather.methods.feather(sparsity=0.5, theta=1.0, pattern=pattern)
    sparsifier = feather.sparsify(
        net, optimizer, replace(method, latent_update=update), sparsity=0.5, total_steps=TOTAL,
        exclude=[n for n in case.prunable if pattern and net.get_parameter(n).shape[1] % 4],
    )  # fmt: skip
    for number in range(4):
        for group in optimizer.param_groups:
            group["lr"] *= 1 - 0.1 * number  # as a scheduler does
        before = sparsifier.latent_weights()
        optimizer.zero_grad()
        x, y = case.batch(number, torch.float64)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        rates = {id(group["params"][0]): group["lr"] for group in optimizer.param_groups}
        assert len({*rates.values()}) == len(rates)
        for name, found in sparsifier.latent_weights().items():
            p = net.get_parameter(name)
            expected = update(before[name] - rates[id(p)] * p.grad, p.grad, rates[id(p)])
            assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_weight_without_a_gradient_stays():
    run = start("mlp", "sgd", "feather-ham", beta=0.1).train(0, 2)
    run.loop.gradients(2)
    first, *others = run.sparsifier.latent_weights()
    run.model.get_parameter(first).grad = None
    before = run.sparsifier.latent_weights()
    run.optimizer.step()
    after = run.sparsifier.latent_weights()
    assert torch.equal(before[first], after[first])
    assert not any(torch.equal(before[name], after[name]) for name in others)


@pytest.mark.parametrize("optimizer", ["sgd-fused", "adamw-fused"])
def test_a_skipped_step_changes_nothing(optimizer):
    """A fused optimizer decides itself, and its gradients are infinite then."""
    run = start("mlp", optimizer, "feather-ham", beta=0.1).train(0, 2)
    before = snapshot(run)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    run.optimizer.zero_grad()
    x, y = run.case.batch(2, torch.float32)
    scaler.scale(F.cross_entropy(run.model(x), y) * torch.inf).backward()
    scaler.step(run.optimizer)
    after = snapshot(run)
    for key in ("parameters", "latent", "masks", "thresholds", "step"):
        assert_same(after[key], before[key])


def test_gradients_may_be_dropped_after_the_step_of_their_optimizer():
    """Each optimizer's weights are updated after its own step, not after the last one's."""

    def train(drop):
        net = MODELS["mlp"].make()
        optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in net.parameters()]
        sparsifier = feather.sparsify(net, optimizers, "feather-ham", **SETTINGS)
        for number in range(4):
            x, y = MODELS["mlp"].batch(number, torch.float32)
            F.cross_entropy(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                if drop:
                    optimizer.zero_grad()
            net.zero_grad()
        return sparsifier.latent_weights()

    assert_same(train(drop=True), train(drop=False))


def test_the_learning_rate_may_be_a_tensor():
    def train(lr):
        net = MODELS["mlp"].make()
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
        sparsifier = feather.sparsify(net, optimizer, "feather-ham", **SETTINGS)
        compiled_step = torch.compile(optimizer.step, backend="eager")
        for number in range(3):
            optimizer.zero_grad()
            x, y = MODELS["mlp"].batch(number, torch.float32)
            F.cross_entropy(net(x), y).backward()
            compiled_step() if isinstance(lr, torch.Tensor) else optimizer.step()
        return sparsifier.latent_weights()

    found, expected = train(torch.tensor(0.125)), train(0.125)
    for name, w in expected.items():
        assert_close(found[name], w)


def test_an_optimizer_that_ascends_is_an_error():
    net = MODELS["mlp"].make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, maximize=True)
    with pytest.raises(ConfigurationError, match=r"0\.weight.*maximize=True.*Negate the loss"):
        feather.sparsify(net, optimizer, "feather-ham", **SETTINGS)
    feather.sparsify(net, optimizer, "feather", **SETTINGS)  # nothing was attached


def test_the_update_is_part_of_the_fingerprint_only_if_there_is_one():
    def fingerprint(method, **options):
        run = start("mlp", method=method, **options)
        return run.sparsifier.step.training.method.fingerprint

    plain, ham = fingerprint("feather"), fingerprint("feather-ham")
    assert ham == f"{plain} HAM(alpha=20.0, beta=0.0)"
    assert ham == fingerprint("feather-ham", alpha=20)
    assert ham != fingerprint("feather-ham", alpha=10.0)
    assert "None" not in plain

"""ProbMask: projection, noise, gradients, several passes per step, and phases."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_feather as feather
from torch_feather import ConfigurationError, devices
from torch_feather.methods import build_method
from torch_feather.methods.own_parameters import Adam
from torch_feather.methods.probmask import passes
from torch_feather.methods.probmask.projection import project_
from torch_feather.methods.probmask.random_numbers import uniform

from .harness import RECIPES, TOTAL, Loop, Run, assert_exact, assert_same, snapshot, start
from .methods import METHODS, project, splitmix64
from .models import MODELS
from .optimizers import OPTIMIZERS, as_list
from .test_trajectory import compare, precision

FAST = {"method": "probmask", "lr": 0.1, "epochs": 12, "finetune": 0.3}
TARGET_STEP = 7  # of FAST, in steps


def at_work(sparsity: float = 0.9, total_steps: int = 320, **options):
    """The method on a layer of 30 weights."""
    model = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return feather.sparsify(
        model, optimizer, "probmask", sparsity=sparsity, total_steps=total_steps, **options
    )


def set_step(sparsifier: feather.Sparsifier, step: int) -> None:
    sparsifier.step.training.count.fill_(step)
    sparsifier.step.training.write_effective()


# --- projection -----------------------------------------------------------------------------


POINTS = {
    "after a step from 1": lambda n: 1 + 0.006 * torch.randn(n).sign(),
    "uniform": torch.rand,
    "beyond both ends": lambda n: 3 * torch.rand(n) - 1,
    "nearly 0 or 1": lambda n: (torch.rand(n) < 0.1).double() + 0.01 * torch.randn(n),
    "heavy tail": lambda n: torch.exp(torch.randn(n)),
    "all the same": lambda n: torch.full((n,), 0.7),
    "few values": lambda n: torch.randint(-2, 6, (n,)) / 4,
    "none above 0": lambda n: -torch.rand(n),
    "one far away": lambda n: torch.cat([torch.rand(n - 1) / 100, torch.tensor([5.0])]),
}


@pytest.mark.parametrize("way", ["of the cpu", "of a device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("points", POINTS)
def test_the_projection_is_the_nearest_point_within_the_budget(points, dtype, way, monkeypatch):
    monkeypatch.setattr(devices, "synchronizes", lambda _: way == "of a device")
    for size in (1, 7, 500):
        x = POINTS[points](size).to(dtype)
        for fraction in (0.003, 0.1, 0.5, 0.97, 1.0):
            budget = fraction * size
            found = project_(x.clone(), torch.tensor(budget, dtype=torch.float64))
            tolerance = 1e-9 if dtype == torch.float64 else 1e-5 * max(1.0, x.abs().max().item())
            torch.testing.assert_close(found, project(x, budget), rtol=0, atol=tolerance)
            assert ((found >= 0) & (found <= 1)).all()
            assert found.sum() <= budget + size * tolerance


def test_values_within_the_budget_are_only_clamped():
    x = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5])
    found = project_(x.clone(), torch.tensor(2.25))
    assert torch.equal(found, torch.tensor([0.0, 0.0, 0.25, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_arrays_of_a_cpu_give_the_gradient_and_the_masks_of_tensors(dtype, monkeypatch):
    """The forms for a CPU, and those for any device."""
    g, w, p, m = torch.randn(300, 250, dtype=dtype), torch.randn(300, 250, dtype=dtype), *(
        torch.rand(300, 250, dtype=dtype).clamp(0.0, 0.99).sub(0.01).clamp_min(0) for _ in range(2)
    )  # fmt: skip
    g[3, 5], g[70, 2] = torch.inf, torch.nan
    factor, found = torch.tensor(3.0, dtype=torch.float64), []
    for flat_arrays in (passes.flat_arrays, lambda *_: None):
        monkeypatch.setattr(passes, "flat_arrays", flat_arrays)
        found.append(torch.empty_like(w))
        passes.write_gradient(found[-1], g, w, p, m, factor)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(*found, rtol=tolerance, atol=0)
    assert found[0][3, 5] == found[0][70, 2] == 0
    mask, q = torch.empty_like(p), passes.inside(p)
    passes.draw_on_cpu(p.flatten(), 7, 11, 3.0, mask.view(-1))
    u = uniform(7, torch.tensor(11), p.numel(), dtype).view_as(p)
    expected = torch.sigmoid(3 * (q.logit() + u.logit()))
    torch.testing.assert_close(
        mask, expected, rtol=2e-5 if dtype == torch.float32 else 1e-9, atol=0
    )


# --- noise ----------------------------------------------------------------------------------


def test_the_generator_gives_the_published_numbers():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, i) for i in range(3)] == published


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 12345])
@pytest.mark.parametrize("position", [0, 10**6, 2**40])
def test_noise_depends_only_on_seed_and_position(seed, position):
    found = uniform(seed, torch.tensor(position), 100, torch.float32)
    bits = [splitmix64(seed % 2**64, position + i) >> 41 for i in range(100)]
    expected = (torch.tensor(bits, dtype=torch.float64) + 0.5) / 2**23
    assert torch.equal(found.double(), expected)
    assert torch.equal(uniform(seed, torch.tensor(position), 100, torch.float64), expected)
    assert torch.equal(uniform(seed, torch.tensor(position + 30), 70, torch.float32), found[30:])


def test_noise_is_uniform_and_without_correlation():
    count = 1 << 18
    rows = torch.stack([
        uniform(seed, torch.tensor(draw * count), count, torch.float64)
        for seed, draw in [(0, 0), (0, 1), (1, 0)]
    ])  # fmt: skip
    assert 0 < rows.min() < 2**-15
    assert 1 - 2**-15 < rows.max() < 1
    fractions = torch.histc(rows, 64, 0, 1) / rows.numel()
    assert (fractions - 1 / 64).abs().max() < 0.05 / 64
    shifted = torch.cat([rows, rows[:1].roll(1, 1)])
    correlations = torch.corrcoef(shifted) - torch.eye(4)
    assert correlations.abs().max() < 4 / count**0.5


# --- schedules as published -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "sharpness"), [(0, 1.0), (149, 1 / (0.97 * 151 / 300 + 0.03)), (299, 30.0903)]
)
def test_masks_sharpen_as_published(step, sharpness):
    """300 epochs of one step, and 20 more."""
    sparsifier = at_work(total_steps=320)
    assert sparsifier.target_step == 300
    set_step(sparsifier, step)
    assert float(sparsifier.step.training.pruning.sharpness) == pytest.approx(sharpness, rel=1e-4)


@pytest.mark.parametrize(
    ("epoch", "fraction"), [(0, 0.0), (48, 0.0), (114, 0.875), (180, 1.0), (299, 1.0)]
)
@pytest.mark.parametrize("steps", [1, 10])
def test_the_budget_falls_as_published(epoch, fraction, steps):
    method = at_work(total_steps=320 * steps).step.training.method
    for step in {epoch * steps, epoch * steps + steps - 1}:  # the same for all steps of an epoch
        budget = method._budget(method._epoch(torch.tensor(step)), 30)
        assert float(budget) == pytest.approx(30 - 27 * fraction)


def test_all_weights_are_kept_at_first():
    sparsifier = at_work()
    [probability] = sparsifier.parameters()
    assert (probability == 1).all()
    # One in 2^21 is not, at this temperature.
    mask = sparsifier.model.weight / sparsifier.latent_weights()["weight"]
    assert (mask > 0.99).all()
    assert (mask < 1).any()


# --- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 100, 299])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_those_of_the_drawn_mask(step, dtype):
    model = nn.Linear(40, 50, bias=False, dtype=dtype)
    sparsifier = feather.sparsify(
        model, torch.optim.SGD(model.parameters(), 0.1), "probmask", sparsity=0.9, total_steps=320
    )
    p = torch.rand(50, 40, dtype=dtype)
    p[0], p[1], p[2] = 0.0, 1.0, 0.5
    sparsifier.parameters()[0].copy_(p)
    set_step(sparsifier, step)
    x = torch.randn(9, 40, dtype=dtype)
    model(x).square().sum().backward()
    sparsifier.complete_gradients()

    w = sparsifier.latent_weights()["weight"].requires_grad_()
    p.requires_grad_()
    u = uniform(0, torch.tensor(0), 2000, dtype).view(50, 40)
    inside = p + (p.detach().clamp(2**-21, 1 - 2**-21) - p.detach())
    logit = inside.log() - (1 - inside).log() + u.log() - (1 - u).log()
    mask = torch.sigmoid(logit / (0.97 * (1 - step / 300) + 0.03))
    F.linear(x, w * mask).square().sum().backward()
    # 1 - mask has few digits if the mask is nearly 1.
    close = {"rtol": 1e-3, "atol": 2e-2} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(model.weight.grad, w.grad, **close)
    torch.testing.assert_close(sparsifier.parameters()[0].grad, p.grad, **close)
    assert (p.grad != 0).any()


def test_adam_is_that_of_torch():
    x, gradients = torch.randn(50), torch.randn(6, 50)
    reference = nn.Parameter(x.clone())
    optimizer = torch.optim.Adam([reference], lr=0.03, betas=(0.8, 0.95), eps=1e-3)
    adam, mean, square = Adam(0.06, 0.8, 0.95, 1e-3), torch.zeros(50), torch.zeros(50)
    for t, gradient in enumerate(gradients, 1):
        reference.grad = gradient.clone()
        optimizer.step()
        adam.step(gradient, x, mean, square, torch.tensor(t), torch.tensor(0.5))
        torch.testing.assert_close(x, reference.detach())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", ["adamw-fused", "sgd-nested"])
def test_every_way_to_use_an_optimizer(optimizer, recipe):
    recipe = RECIPES[recipe]
    compare("probmask-fast", optimizer, recipe=recipe, **precision(recipe))


@pytest.mark.parametrize("model", MODELS)
def test_every_model(model):
    compare("probmask-fast", model=model)


# --- several passes of one step -------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["plain", "clip", "accumulate", "scaler", "scaler + clip"])
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw-fused"])
def test_passes_average_over_masks(optimizer, recipe):
    """Gradients of three masks, each with its own part in the gradient of the probabilities."""
    recipe, method, dtype = RECIPES[recipe], METHODS["probmask-fast"], torch.float64
    run = start("convnet", optimizer, dtype=dtype, recipe=recipe, sparsity=method.sparsity, **FAST)
    case, net = run.case, run.case.make(0, dtype)
    reference = method.refer(net, case, TOTAL)
    optimizers = [*as_list(OPTIMIZERS[optimizer](net)), reference.inner_optimizer(0.1)]
    other = Loop(reference, net, optimizers, case, recipe, dtype, reference)

    def masks_of_engine():
        yield from run.sparsifier.passes(3)

    def masks_of_reference():
        yield 1 / 3
        for _ in range(2):
            reference.draw += 1
            yield 1 / 3

    def step(loop: Loop, fractions, number: int) -> bool:
        for one in loop.optimizers:
            one.zero_grad()
        for fraction in fractions:
            for part in range(recipe.accumulate):
                x, y = case.batch(number * recipe.accumulate + part, dtype)
                loss = fraction * F.cross_entropy(loop.forward(x), y) / recipe.accumulate
                loss = loss * torch.inf if number in recipe.overflows else loss
                loop.scaler.scale(loss).backward()
        if recipe.clip is not None:
            for one in loop.optimizers if recipe.scaler else []:
                loop.scaler.unscale_(one)
            if loop is run.loop:
                run.sparsifier.complete_gradients()
            parameters = [*loop.model.parameters(), *loop.method.parameters()]
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
        for one in loop.optimizers:
            loop.scaler.step(one)
        loop.scaler.update()
        return number not in recipe.overflows

    for number in range(TOTAL + 1 + len(recipe.overflows)):
        step(run.loop, masks_of_engine(), number)
        reference.step_count += step(other, masks_of_reference(), number)
        assert run.sparsifier.step_count == reference.step_count
        for p, q in zip(run.sparsifier.parameters(), reference.learned, strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=1e-8, atol=1e-9)
        latent = run.sparsifier.latent_weights()
        for name, w in reference.latent.items():
            torch.testing.assert_close(latent[name], w.detach(), rtol=1e-8, atol=1e-9)
    assert run.zeros() == round(method.sparsity * case.size)


def train_by_passes(run: Run, steps: range, count: int | None = None) -> Run:
    for step in steps:
        x, y = run.case.batch(step)
        run.optimizer.zero_grad()
        for fraction in run.sparsifier.passes(count):
            (fraction * F.cross_entropy(run.model(x), y)).backward()
        run.optimizer.step()
    return run


def test_one_pass_is_the_plain_loop():
    plain = start("convnet", **FAST).train(0, TOTAL)
    assert_same(snapshot(train_by_passes(start("convnet", **FAST), range(TOTAL))), snapshot(plain))


def test_the_number_of_passes_is_that_of_the_method():
    run, other = start("convnet", passes=2, **FAST), start("convnet", **FAST)
    assert list(run.sparsifier.passes()) == [0.5, 0.5]
    run, other = start("convnet", passes=2, **FAST), start("convnet", **FAST)
    train_by_passes(run, range(TOTAL))
    train_by_passes(other, range(TOTAL), 2)
    assert_same(run.model.state_dict(), other.model.state_dict())
    assert_same(run.sparsifier.parameters(), other.sparsifier.parameters())
    once = start("convnet", **FAST).train(0, TOTAL)
    assert not torch.equal(once.model.stem.weight, run.model.stem.weight)


def test_missing_passes_give_one_warning():
    run = start("convnet", passes=2, **FAST)
    with pytest.warns(feather.FeatherWarning, match="this step took one") as caught:
        run.train(0, 3)
    assert len([one for one in caught if "passes=2" in str(one.message)]) == 1


def test_passes_of_a_method_without_masks_are_parts_of_the_gradient():
    run = train_by_passes(start("mlp", "sgd"), range(6), 4)
    plain = start("mlp", "sgd").train(0, 6)
    for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert run.sparsifier.finalize() is run.model
    assert list(run.sparsifier.passes(2)) == [0.5, 0.5]


def test_an_abandoned_step_has_no_effect_on_the_next():
    run, other = (start("mlp", "sgd", **FAST).train(0, 2) for _ in range(2))
    x, y = run.case.batch(5)
    for number, _ in enumerate(run.sparsifier.passes(3)):
        (1e6 * F.cross_entropy(run.model(x), y)).backward()
        if number == 1:
            break
    # The same masks for both: draws are counted.
    for one in (run, other):
        one.sparsifier.step.training.method.state["draws"].flat.fill_(9)
        one.sparsifier.step.training.write_effective()
    assert_same(
        snapshot(train_by_passes(run, range(2, 5), 2)),
        snapshot(train_by_passes(other, range(2, 5), 2)),
    )


def test_values_written_between_passes_become_latent():
    run = start("mlp", "sgd", **FAST).train(0, 3)
    written = torch.randn(4, 12)
    for number, _ in enumerate(run.sparsifier.passes(2)):
        if number == 0:
            with torch.no_grad():
                run.model[2].weight.copy_(written)
    assert torch.equal(run.sparsifier.latent_weights()["2.weight"], written)


def test_several_passes_resume_bitwise():
    whole = train_by_passes(start("convnet", passes=2, **FAST), range(TOTAL))
    run = train_by_passes(start("convnet", passes=2, **FAST), range(4))
    resumed = start("convnet", passes=2, seed=1, **FAST).load(run.save())
    assert_same(snapshot(train_by_passes(resumed, range(4, TOTAL))), snapshot(whole))


# --- phases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_last_phase_is_exact_and_keeps_the_most_probable(model):
    run = start(model, **FAST).train(0, TARGET_STEP - 1)
    assert run.zeros() != round(0.8 * run.case.size)
    run.train(TARGET_STEP - 1, TARGET_STEP)
    masks = run.sparsifier.masks()
    probabilities = run.sparsifier.parameters()
    kept = torch.cat([p[m] for p, m in zip(probabilities, masks.values(), strict=True)])
    pruned = torch.cat([p[~m] for p, m in zip(probabilities, masks.values(), strict=True)])
    assert kept.min() >= pruned.max()
    frozen = copy.deepcopy(probabilities)
    latent = run.sparsifier.latent_weights()
    for step in range(TARGET_STEP, TOTAL + 3):
        assert_exact(run)
        assert run.zeros() == round(0.8 * run.case.size)
        assert_same(run.sparsifier.masks(), masks)
        assert_same(run.sparsifier.parameters(), frozen)
        run.train(step, step + 1)
    for name, w in run.sparsifier.latent_weights().items():
        assert not torch.equal(w, latent[name])  # it fine-tunes


def test_the_network_can_be_finalized_as_soon_as_it_is_exact():
    run = start("convnet", **FAST).train(0, TARGET_STEP - 1)
    with pytest.raises(feather.StateError, match=r"0\.8"):
        run.sparsifier.finalize()
    run.train(TARGET_STEP - 1, TARGET_STEP).sparsifier.finalize()
    assert run.zeros() == round(0.8 * run.case.size)


@pytest.mark.parametrize(
    ("total", "finetune", "target_step"),
    [(1, 0.0625, 1), (1, 0.9, 1), (8, 0.0625, 8), (16, 0.0625, 15), (320, 0.0625, 300),
     (10, 0.0, 10), (10, 0.99, 1)],
)  # fmt: skip
def test_the_last_phase_has_its_fraction_of_the_steps(total, finetune, target_step):
    run = start("mlp", total_steps=total, method="probmask", finetune=finetune)
    assert run.sparsifier.target_step == target_step
    run.train(0, total)
    assert run.zeros() == 96
    run.sparsifier.finalize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_reported_sparsity_is_that_of_the_network_at_every_step(dtype):
    run = start("convnet", "sgd", dtype=dtype, **FAST)
    for step in range(TOTAL):
        assert run.sparsifier.sparsity == pytest.approx(run.zeros() / 360)
        assert_exact(run)
        run.train(step, step + 1)
    assert run.zeros() == 288


def test_equal_probabilities_are_pruned_at_random():
    """Not by their position, which would empty the first layers; another seed prunes others."""
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 100))
    masks = []
    for seed in (0, 0, 1):
        sparsifier = feather.sparsify(
            model, torch.optim.SGD(model.parameters(), 0.0), "probmask", sparsity=0.9,
            total_steps=1, finetune=0.0, seed=seed,
        )  # fmt: skip
        sparsifier.step.training.method.state["probability"].rows[1][:50].fill_(0.25)
        frozen = sparsifier.step.training.method._most_probable(torch.ones((), dtype=torch.int64))
        assert int((frozen == 0).sum()) == 9000
        assert (frozen[5000:7500] == 0).all()  # the least probable first
        masks.append(frozen)
        for part in (frozen[:5000], frozen[7500:]):
            assert (part == 0).double().mean() == pytest.approx(6500 / 7500, abs=0.03)
        sparsifier.detach()
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_the_learned_sparsity_is_that_of_the_probabilities():
    run = start("convnet", **FAST).train(0, TOTAL)
    flat = torch.cat([p.flatten() for p in run.sparsifier.parameters()])
    # Of masks that are drawn, not of the probabilities' nearer ends.
    own = 1 - float(flat.double().mean())
    assert own != pytest.approx(float((flat < 0.5).double().mean()), abs=0.02)
    own = pytest.approx(own, abs=0.5 * len(run.sparsifier.parameters()) / len(flat))
    assert run.sparsifier.learned_sparsity == own
    assert float(flat.sum()) == pytest.approx(72, rel=1e-5)
    run.sparsifier.finalize()
    assert run.sparsifier.learned_sparsity == own


def test_kept_latent_zeros_do_not_count_as_pruned():
    model = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = feather.sparsify(model, optimizer, "probmask", sparsity=0.7, total_steps=4)
        for _ in range(4):
            model(torch.randn(2, 10)).sum().backward()
            optimizer.step()
    assert sparsifier.sparsity == pytest.approx(0.7)


@pytest.mark.slow
def test_it_finds_the_weights_that_matter():
    """Linear regression on 40 inputs, of which 6 matter: those remain."""
    generator = torch.Generator().manual_seed(0)
    matter = torch.randperm(40, generator=generator)[:6]
    solution = torch.zeros(40)
    solution[matter] = torch.tensor([1.0, -1.5, 2.0, -1.0, 1.2, -0.8])
    model = nn.Linear(40, 1, bias=False)
    nn.init.normal_(model.weight, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    sparsifier = feather.sparsify(
        model, optimizer, "probmask", sparsity=0.85, total_steps=1000, lr=0.02
    )
    for _ in range(1000):
        x = torch.randn(64, 40, generator=generator)
        optimizer.zero_grad()
        (model(x)[:, 0] - x @ solution).square().mean().backward()
        optimizer.step()
    sparsifier.finalize()
    torch.testing.assert_close(model.weight[0].detach(), solution, rtol=0, atol=0.05)


# --- other events ---------------------------------------------------------------------------


def test_every_step_draws_its_own_mask_and_the_seed_decides_which():
    first, second = (start("convnet", **FAST) for _ in range(2))
    assert_same(snapshot(first), snapshot(second))
    model = MODELS["convnet"].make(0)
    optimizer = OPTIMIZERS["sgd-momentum"](model)
    other = feather.sparsify(
        model, optimizer, sparsity=0.8, total_steps=TOTAL, **{**FAST, "seed": 1}
    )
    assert not torch.equal(model.stem.weight, first.model.stem.weight)
    assert_same(other.latent_weights(), first.sparsifier.latent_weights())
    for group in first.optimizer.param_groups:
        group["lr"] = 0.0
    before = first.model.stem.weight.detach().clone()
    first.train(0, 1)
    assert not torch.equal(first.model.stem.weight, before)


@pytest.mark.parametrize("move", ["double", "channels last"])
def test_moving_the_model_keeps_every_probability_with_its_weight(move):
    run = start("convnet", "sgd", **FAST).train(0, 4)
    before, latent = copy.deepcopy(run.sparsifier.parameters()), run.sparsifier.latent_weights()
    if move == "double":
        run.model.double()
        run.loop.dtype = torch.float64
    else:
        run.model.to(memory_format=torch.channels_last)
    run.sparsifier.attachment.sync()
    for p, q in zip(before, run.sparsifier.parameters(), strict=True):
        assert torch.equal(p.to(q), q)
    for name, w in run.sparsifier.latent_weights().items():
        assert torch.equal(w, latent[name].to(w))
    run.train(4, TOTAL)
    assert_exact(run)
    assert run.zeros() == 288


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "muon+adamw"])
def test_probabilities_are_restored_bitwise_also_if_loaded_before_sparsify(optimizer, dtype):
    whole = start("convnet", optimizer, dtype=dtype, **FAST).train(0, 4)
    checkpoint = whole.save()
    end = snapshot(whole.train(4, TOTAL))
    own = copy.deepcopy(whole.sparsifier.parameters())
    resumed = start("convnet", optimizer, dtype=dtype, seed=3, **FAST).load(checkpoint)
    assert_same(snapshot(resumed.train(4, TOTAL)), end)
    assert_same(resumed.sparsifier.parameters(), own)
    case = MODELS["convnet"]
    net = case.make(7, dtype)
    made = OPTIMIZERS[optimizer](net)
    late = Run(net, made, None, Loop(net, net, made, case, dtype=dtype), case).load(checkpoint)
    late.sparsifier = feather.sparsify(net, made, sparsity=0.8, total_steps=TOTAL, **FAST)
    assert_same(snapshot(late.train(4, TOTAL)), end)


def test_an_average_of_the_latents_takes_the_frozen_mask():
    run = start("convnet", **FAST)
    average = feather.LatentAverage(run.sparsifier, decay=0.5)
    for step in range(TOTAL):
        run.train(step, step + 1)
        average.update()
    copied = average.copy_to(copy.deepcopy(run.model))
    assert run.case.zeros(copied) == 288
    assert torch.equal(copied.stem.weight == 0, run.model.stem.weight == 0)


def test_nan_stays_visible():
    run = start("mlp", "sgd", **FAST).train(0, 2)
    run.model[0].weight.grad = torch.full((12, 6), torch.nan)
    with pytest.raises(FloatingPointError, match=r"0\.weight"):
        run.optimizer.step()


def test_no_zero_is_negative():
    run = start("convnet", **FAST).train(0, TOTAL)
    for p in run.case.weights(run.model).values():
        assert not (torch.signbit(p) & (p == 0)).any()


@pytest.mark.parametrize(
    "options",
    [{"epochs": 1}, {"finetune": 1.0}, {"finetune": -0.1}, {"passes": 0}, {"lr": -1.0}],
    ids=str,
)
def test_invalid_options_are_an_error(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        build_method("probmask", sparsity=0.9, **options)

"""Exactly round(s N) weights are zero at every step, for any weights."""

import math
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torch_feather as feather
from torch_feather.allocation import Global
from torch_feather.errors import ConfigurationError

from .harness import TOTAL, assert_exact, start
from .methods import FRACTIONS, METHODS, smallest, smallest_number
from .models import MODELS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EXACT = [name for name, case in METHODS.items() if case.exact]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", EXACT)
def test_exact_at_every_step_of_training(method, model):
    case = METHODS[method]
    run = start(model, method=case.method, sparsity=case.sparsity, **case.options)
    seen = []
    for step in range(TOTAL):
        assert_exact(run)
        seen.append(run.zeros())
        run.train(step, step + 1)
    assert_exact(run)
    assert run.zeros() == round(case.sparsity * run.case.size)
    assert seen == sorted(seen)


def scalars(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Difficult weights: ties, denormals, the largest and the smallest of a type."""
    info = torch.finfo(dtype)
    huge, least = min(1e30, info.max), smallest_number(dtype)
    corner = [0.0, 0.5, -0.5, 1.0, info.tiny, -info.tiny, least, 3 * least, -least, huge, -huge,
              info.max, -info.max, info.max / 2]  # fmt: skip
    return st.one_of(
        st.sampled_from(corner),
        st.floats(-1, 1),
        st.floats(-1, 1).map(lambda x: x * info.tiny),
        st.integers(-3, 3).map(float),
    )


@st.composite
def layers(draw) -> nn.Module:
    """One to three linear layers, each with a shape and a type of its own."""
    model = nn.Sequential()
    one_dtype = draw(st.sampled_from([*DTYPES, None]))
    for _ in range(draw(st.integers(1, 3))):
        dtype = one_dtype or draw(st.sampled_from(DTYPES))
        shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 9)))
        layer = nn.Linear(shape[1], shape[0], dtype=dtype)
        pool = draw(st.lists(scalars(dtype), min_size=1, max_size=shape[0] * shape[1]))
        # A short pool is repeated: ties.
        values = [pool[i % len(pool)] for i in range(shape[0] * shape[1])]
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(values, dtype=torch.float64).reshape(shape))
        model.append(layer)
    return model


@pytest.mark.parametrize("method", ["feather", "hard-ste", "soft-ste"])
@settings(max_examples=60)
@given(model=layers(), sparsity=st.one_of(st.floats(0, 1, exclude_max=True),
                                          st.sampled_from([0.5, 0.9, 0.95, 0.995])),
       data=st.data())  # fmt: skip
def test_exact_whatever_the_weights(method, model, sparsity, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weights = [layer.weight for layer in model]
    size = sum(w.numel() for w in weights)
    k = round(sparsity * size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that end empty are another test's business
        sparsifier = feather.sparsify(
            model, optimizer, method, sparsity=sparsity, total_steps=3, schedule="constant"
        )
        for _ in range(3):
            latent = list(sparsifier.latent_weights().values())
            kept = list(sparsifier.masks().values())
            assert sum(int((~mask).sum()) for mask in kept) == k
            magnitude = torch.cat([w.abs().flatten().double() for w in latent])
            flat = torch.cat([mask.flatten() for mask in kept])
            if 0 < k < size:
                assert magnitude[~flat].max() <= magnitude[flat].min()
            for u, w, mask in zip(weights, latent, kept, strict=True):
                # A kept weight is zero only if its latent weight is: that cannot be repaired.
                assert torch.equal(u != 0, mask & (w != 0))
                assert torch.equal(u.sign(), torch.where(mask, w.sign(), 0))
                assert (u.abs() <= w.abs()).all()
                assert torch.isfinite(u).all()
            for w in weights:
                scale = float(w.detach().abs().max()) or 1.0
                step = data.draw(st.sampled_from([0.0, 0.25, -0.5]))
                w.grad = torch.full_like(w, step * min(scale, 1.0))
            optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_ties_are_pruned_in_order_and_kept_weights_are_not_zero(sparsity, dtype):
    """All weights tie: the first ones in flat order are pruned, and no kept one becomes zero."""
    model = nn.Sequential(nn.Linear(10, 6, dtype=dtype), nn.Linear(6, 7, dtype=dtype))
    weights = [layer.weight for layer in model]
    with torch.no_grad():
        for w in weights:
            w.fill_(-0.3)
    sparsify = feather.sparsify
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=sparsity,
                 total_steps=4, schedule="constant")  # fmt: skip
    k = round(sparsity * 102)
    kept, _ = smallest([torch.full_like(w, 0.3) for w in weights], k)
    flat = torch.cat([(w != 0).flatten() for w in weights])
    assert torch.equal(flat, torch.cat([mask.flatten() for mask in kept]))
    assert all((w <= 0).all() for w in weights)


def test_ties_are_pruned_in_the_order_of_memory():
    """Any memory format is exact; among equal weights the first in memory are pruned."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=memory_format)
        with torch.no_grad():
            model.weight.fill_(0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        feather.sparsify(model, optimizer, sparsity=0.3, total_steps=4, schedule="constant")
        in_memory = model.weight.detach().as_strided((216,), (1,))
        assert (in_memory[:65] == 0).all()
        assert (in_memory[65:] != 0).all()


@pytest.mark.parametrize("fill", ["normal", "bfloat16 grid", "two values", "one value", "sorted"])
@pytest.mark.parametrize("sparsity", [0.0001, 0.3, 0.9, 0.95, 0.9999])
def test_large_layers_are_exact_too(fill, sparsity):
    """Enough weights for several blocks and samples, with ties across their borders."""
    fills = {
        "normal": lambda w: w,
        "bfloat16 grid": lambda w: w.bfloat16().float(),
        "two values": lambda w: torch.where(w > 0, 0.5, -0.25),
        "one value": lambda w: torch.full_like(w, 0.5),
        "sorted": lambda w: w.flatten().sort().values.view_as(w),
    }
    model = nn.Sequential(nn.Linear(300, 301), nn.Linear(301, 200), nn.Linear(7, 3))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(fills[fill](torch.randn_like(layer.weight)))
    latent = [layer.weight.detach().clone() for layer in model]
    size = sum(w.numel() for w in latent)
    kept, tau = smallest(latent, round(sparsity * size))
    sparsifier = feather.sparsify(
        model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=sparsity, total_steps=4,
        schedule="constant",
    )  # fmt: skip
    for layer, w, mask in zip(model, latent, kept, strict=True):
        assert torch.equal(layer.weight != 0, mask)
        effective = feather.power_threshold(w, tau).where(mask, torch.tensor(0.0))
        torch.testing.assert_close(layer.weight.detach(), effective, rtol=1e-5, atol=0)
    assert all(value == tau for value in sparsifier.thresholds().values())


def test_types_are_ranked_together():
    """Half and single precision layers are ranked by their exact magnitudes."""
    model = nn.Sequential(*[nn.Linear(8, 8, dtype=dtype) for dtype in DTYPES])
    latent = [layer.weight.detach().clone() for layer in model]
    kept, _ = smallest(latent, round(0.7 * 256))
    feather.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.7,
                     total_steps=4, schedule="constant")  # fmt: skip
    for layer, mask in zip(model, kept, strict=True):
        assert torch.equal(layer.weight != 0, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_kept_weight_that_rounds_to_zero_takes_the_smallest_number(dtype):
    """Neighbouring denormals: the soft threshold underflows."""
    least = smallest_number(dtype)
    model = nn.Linear(4, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1, -1, 1, -1]]) * least)
    feather.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), "soft-ste", sparsity=0.5,
                     total_steps=4, schedule="constant")  # fmt: skip
    assert model.weight.tolist() == [[0, 0, least, -least]]


@pytest.mark.parametrize("schedule", ["cubic", "linear", "constant"])
@pytest.mark.parametrize("bounds", [{}, {"begin": 2, "end": 5}])
def test_every_schedule_is_followed_to_the_weight(schedule, bounds):
    if schedule == "constant":
        bounds = {}
    run = start("convnet", schedule=schedule, sparsity=0.9, **bounds)
    begin, end = bounds.get("begin", 0), bounds.get("end", TOTAL // 2)
    for step in range(TOTAL + 1):
        sparsity = 0.9 * FRACTIONS[schedule](step, begin, end)
        assert abs(run.sparsifier.sparsity - sparsity) <= 0.5 / run.case.size + 1e-12
        assert run.zeros() == round(sparsity * run.case.size)
        run.train(step, step + 1)


def test_a_schedule_object_equals_its_name():
    run = start(schedule=feather.schedules.OneShot(3), sparsity=0.9)
    zeros = []
    for step in range(6):
        zeros.append(run.zeros())
        run.train(step, step + 1)
    assert zeros == [0, 0, 0, 108, 108, 108]


def test_one_shot_by_name():
    run = start(schedule="one-shot", begin=4, sparsity=0.9)
    zeros = []
    for step in range(6):
        zeros.append(run.zeros())
        run.train(step, step + 1)
    assert zeros == [0, 0, 0, 0, 108, 108]


def small_head() -> nn.Module:
    """A layer whose weights are all far smaller than the others'."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4))
    with torch.no_grad():
        model[1].weight.mul_(1e-4)
    return model


@pytest.mark.parametrize("min_density", [0.05, 0.25, 1 / 3])
def test_min_density_keeps_its_fraction_of_every_layer_and_the_total_is_exact(min_density):
    model = small_head()
    sparsifier = feather.sparsify(
        model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.6, total_steps=4,
        schedule="constant", min_density=min_density,
    )  # fmt: skip
    kept = [int((layer.weight != 0).sum()) for layer in model]
    assert sum(kept) == 120 - 72
    assert math.floor(min_density * 48) <= kept[1] <= math.ceil(min_density * 48)
    largest = sparsifier.latent_weights()["1.weight"].abs().flatten().topk(kept[1]).indices
    assert (model[1].weight.flatten()[largest] != 0).all()


@pytest.mark.parametrize("max_density", [0.5, 0.75])
def test_max_density_limits_every_layer_and_the_total_is_exact(max_density):
    model = small_head()
    feather.sparsify(
        model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.6, total_steps=4,
        schedule="constant", max_density=max_density,
    )  # fmt: skip
    kept = [int((layer.weight != 0).sum()) for layer in model]
    assert sum(kept) == 48
    assert kept[0] <= math.ceil(max_density * 72)


@pytest.mark.parametrize("most", [10, 10**6, 3 * 10**9])
def test_max_density_tightens_with_the_sparsity_even_if_products_exceed_64_bits(most):
    sizes = torch.randint(1, most, (40,), generator=torch.Generator().manual_seed(most))
    cap = Global(max_density=0.05)
    low = [n - math.ceil(n * 0.05) for n in sizes.tolist()]
    for fraction in (0.0, 0.3, 0.97, 1.0):
        k = int(fraction * sum(low))
        found, _ = cap._bounds_at(sizes, torch.tensor(k))
        assert found.tolist() == [n * k // max(sum(low), 1) for n in low]


def test_both_bounds_hold_throughout_training():
    run = start("convnet", sparsity=0.9, min_density=0.08, max_density=0.3)
    for step in range(TOTAL):
        run.train(step, step + 1)
        assert_exact(run)
        for name, p in run.case.weights(run.model).items():
            density = float((p != 0).double().mean())
            assert density >= math.floor(0.08 * p.numel()) / p.numel(), name
    for name, p in run.case.weights(run.model).items():
        assert float((p != 0).double().mean()) <= math.ceil(0.3 * p.numel()) / p.numel(), name


@pytest.mark.parametrize(
    "bounds",
    [{"min_density": 0.5}, {"max_density": 0.05}, {"min_density": 0.3, "max_density": 0.2},
     {"min_density": -0.1}, {"max_density": 1.5}],
    ids=str,
)  # fmt: skip
def test_bounds_that_contradict_the_target_or_each_other_are_an_error(bounds):
    with pytest.raises(ConfigurationError, match=r"min_density|max_density"):
        start(sparsity=0.9, **bounds)


def test_a_layer_that_begins_empty_is_reported_by_name_and_file():
    model = small_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match=r"1\.weight") as caught:
        feather.sparsify(model, optimizer, sparsity=0.6, total_steps=3, schedule="constant")
    assert len(caught) == 1
    if sys.version_info >= (3, 12):  # earlier versions cannot skip the frames of a package
        assert caught[0].filename == __file__
    assert not (model[1].weight != 0).any()


def test_a_layer_that_becomes_empty_while_training_is_reported_by_name():
    model = small_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.6, total_steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            model(torch.randn(3, 6)).sum().backward()
            optimizer.step()
        sparsifier.finalize()
    about = [str(w.message) for w in caught if issubclass(w.category, feather.FeatherWarning)]
    assert len(about) == 1  # once, not at every step
    assert "1.weight" in about[0]
    assert not (model[1].weight != 0).any()


@pytest.mark.parametrize("steps", [4, 400])
def test_one_warning_lists_all_empty_layers_and_the_option(steps):
    """They become empty one after the other; at 400 steps, checks come before the target."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    with torch.no_grad():
        for i, layer in enumerate(model[:5]):
            layer.weight.mul_(10.0 ** (i - 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step()
        sparsifier.finalize()
    [text] = [str(w.message) for w in caught if issubclass(w.category, feather.FeatherWarning)]
    assert all(f"{i}.weight" in text for i in range(5))
    assert "5.weight" not in text
    assert 'exclude=["0.weight", "1.weight", "2.weight", "..."]' in text
    assert "min_density=0.01" in text


def test_layers_that_become_empty_later_are_listed_at_the_end():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    with torch.no_grad():
        model[0].weight.mul_(1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, sparsity=0.5, total_steps=4, schedule="constant"
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        with torch.no_grad():
            model[0].weight.fill_(5.0)
            model[1].weight.mul_(1e-4)
        for _ in range(3):
            optimizer.step()
        sparsifier.finalize()
    [text] = [str(w.message) for w in caught if issubclass(w.category, feather.FeatherWarning)]
    assert text.startswith("Every weight of 1.weight is pruned")


def test_more_zero_latents_than_pruned_weights_are_reported():
    """They cannot be repaired: the model then has more zeros than its schedule asks for."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="60 latent weights that should be kept are exactly 0"):
        sparsifier = feather.sparsify(
            model, optimizer, sparsity=0.1, total_steps=1, schedule="constant"
        )
    assert sum(int((~mask).sum()) for mask in sparsifier.masks().values()) == 12


def test_thresholds_are_the_kth_magnitude():
    run = start("convnet", schedule="constant", sparsity=0.7)
    _, tau = smallest(run.sparsifier.latent_weights().values(), round(0.7 * run.case.size))
    thresholds = run.sparsifier.thresholds()
    assert set(thresholds) == set(run.case.prunable)
    for value in thresholds.values():
        assert value.dim() == 0
        assert value == tau

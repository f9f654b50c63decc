"""The engine's trajectory is that of the paper's autograd form, to rounding.

Both are trained on the same batches with the same optimizer. After every step the gradients that
the user has, the latent weights, the effective weights and the sparsity have to agree. Arithmetic
is float64 if possible, so that no deviation is mistaken for rounding.
"""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import torch_feather as feather

from .harness import RECIPES, STEPS, TOTAL, Loop, Recipe, start
from .methods import METHODS
from .models import MODELS
from .optimizers import FUSED, OPTIMIZERS, SELECTED, as_list


def compare(
    method: str = "feather",
    optimizer: str = "sgd-momentum",
    model: str = "convnet",
    recipe: Recipe = RECIPES["plain"],
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    prepare=lambda model: model,
) -> None:
    method, made = METHODS[method], OPTIMIZERS[optimizer]
    run = start(
        model, optimizer, method.method, recipe=recipe, dtype=dtype, sparsity=method.sparsity,
        total_steps=TOTAL, **method.options,
    )  # fmt: skip
    run.loop.forward = prepare(run.model)
    case = run.case
    net = case.make(0, dtype)
    reference = method.refer(net, case, TOTAL)
    optimizers = [*as_list(made(net))]
    groups = [group for one in optimizers for group in one.param_groups]
    reference.rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    if reference.learned:
        first = next(iter(reference.latent.values()))
        optimizers.append(reference.inner_optimizer(float(reference.rates[id(first)])))
    loop = Loop(reference, net, optimizers, case, run.loop.recipe, dtype, reference)
    if tolerance is None:
        tolerance = max(made.tolerance, method.tolerance)
    close = {"rtol": tolerance, "atol": tolerance / 10}
    # The operator's slope grows without bound towards the threshold, and rounding with it.
    near = {"rtol": 10 * tolerance, "atol": tolerance}
    actual, expected = case.weights(run.model), reference.latent

    def check(step: int) -> None:
        at = f"step {step}: "
        assert run.sparsifier.step_count == reference.step_count, at
        # It may be the target of this step or the actual fraction: they are equal to rounding.
        assert abs(run.sparsifier.sparsity - reference.sparsity) <= 0.5 / case.size + 1e-12, at
        latent = run.sparsifier.latent_weights()
        effective = reference.effective()
        assert list(latent) == list(actual)
        for name in actual:
            message = lambda m, name=name: f"{at}{name}: {m}"  # noqa: E731
            assert_close(latent[name], expected[name].detach(), msg=message, **close)
            assert_close(actual[name].detach(), effective[name].detach(), msg=message, **near)
            if actual[name].grad is not None and step not in recipe.overflows:
                assert_close(actual[name].grad, expected[name].grad, msg=message, **close)
        for p, q in zip(run.sparsifier.parameters(), reference.parameters(), strict=True):
            assert_close(p, q.detach(), msg=lambda m: f"{at}the method's own: {m}", **close)
        for (name, p), q in zip(run.model.named_parameters(), net.parameters(), strict=True):
            if name not in actual:
                assert_close(p, q, msg=lambda m, name=name: f"{at}{name}: {m}", **close)

    check(-1)
    # What learns its thresholds is exact from the last step on.
    for step in range((STEPS if method.exact else TOTAL + 2) + len(recipe.overflows)):
        run.loop.step(step)
        if loop.step(step):
            reference.advance()
        check(step)
    # A trajectory that stands still would prove nothing.
    assert case.zeros(run.model) == round(method.sparsity * case.size)
    first = list(case.make(0, dtype).parameters())
    assert any(not torch.equal(p, q) for p, q in zip(first, net.parameters(), strict=True))
    for p, q in zip(first, run.model.parameters(), strict=True):
        assert p.requires_grad or torch.equal(p, q), "a frozen parameter was touched"


def precision(recipe: Recipe) -> dict[str, object]:
    """Autocast takes float32, and its bf16 products make 1/256 of a last-bit difference."""
    if recipe.autocast:
        return {"dtype": torch.float32, "tolerance": 2e-2}
    return {}


def test_every_method_is_listed():
    named = {case.method for case in METHODS.values() if isinstance(case.method, str)}
    assert named == set(feather.available_methods())


def pairs() -> Iterator[ParameterSet]:
    """Every method with every optimizer; every tenth pair is in the suite."""
    for (i, method), (j, optimizer) in product(enumerate(METHODS), enumerate(OPTIMIZERS)):
        # SOAP turns into eigenvectors of matrices of low rank, which the last bit decides: where a
        # method's own gradient enters the clipping, no other form of it has all bits the same.
        if not METHODS[method].exact and "soap" in optimizer:
            continue
        # L-BFGS takes differences of gradients under different masks for curvature, and diverges.
        if optimizer == "lbfgs" and method.startswith(("probmask", "spartan", "feather-asl+")):
            continue
        marks = [pytest.mark.more] if (i + j) % 10 else []
        yield pytest.param(method, optimizer, marks=marks)


def test_each_method_and_each_optimizer_is_in_a_pair_of_the_suite():
    fast = [pair.values for pair in pairs() if not pair.marks]
    assert {method for method, _ in fast} == set(METHODS)
    assert {optimizer for _, optimizer in fast} == set(OPTIMIZERS)


@pytest.mark.parametrize(("method", "optimizer"), pairs())
def test_every_method_under_every_optimizer(method, optimizer):
    compare(method, optimizer, "mlp", RECIPES["clip"])


@pytest.mark.parametrize("recipe", ["accumulate", "autocast", "scaler", "scaler + clip"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_under_every_recipe(method, recipe):
    recipe = RECIPES[recipe]
    compare(method, model="mlp", recipe=recipe, **precision(recipe))


def test_latent_updates_follow_the_learning_rate_of_each_optimizer():
    made = OPTIMIZERS["muon+adamw"](MODELS["convnet"].make())
    assert len({group["lr"] for one in made for group in one.param_groups}) == 2
    compare("feather-ham", "muon+adamw")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_a_frozen_layer(method):
    compare(method, model="frozen")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_under_compile(method):
    """The backward pass is compiled too; masks and weights that change make no new graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compare(
        method,
        model="mlp",
        prepare=lambda model: torch.compile(model, backend=counter, fullgraph=True),
    )
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("method", "optimizer", "recipe"),
    [
        (method, optimizer, recipe)
        for method in ("feather-theta", "asl-fast", "spartan-frozen")
        for optimizer in SELECTED
        for recipe in RECIPES
        # The others' steps by plain SGD are those of the nested one.
        if method == "feather-theta" or optimizer != "sgd-momentum"
    ],
)
def test_every_way_to_use_an_optimizer(method, optimizer, recipe):
    recipe = RECIPES[recipe]
    compare(method, optimizer, recipe=recipe, **precision(recipe))


@pytest.mark.parametrize("method", ["feather-theta", "feather-ham", "asl-fast", "spartan-frozen"])
@pytest.mark.parametrize(
    ("optimizer", "recipe"),
    [
        (optimizer, recipe)
        for optimizer in FUSED
        for recipe in ("scaler", "scaler + clip", "scaler from an overflow")
        # torch 2.14 leaves the momentum of fused SGD uninitialised if its first step is skipped.
        if (optimizer, recipe) != ("sgd-fused", "scaler from an overflow")
    ],
)
def test_fused_optimizers_under_a_grad_scaler(optimizer, recipe, method):
    compare(method, optimizer, recipe=RECIPES[recipe])


@pytest.mark.parametrize("recipe", ["plain", "accumulate", "autocast"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model(model, recipe):
    recipe = RECIPES[recipe]
    compare("feather-theta", model=model, recipe=recipe, **precision(recipe))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "sgd-foreach", "adamw"])
@pytest.mark.parametrize("method", ["feather-theta", "hard-ste", "soft-ste"])
def test_other_dtypes(method, optimizer, dtype):
    if (optimizer, dtype) == ("adamw", torch.float16):
        optimizer = "lion (pytorch_optimizer)"  # Adam's epsilon is 0 in float16
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    compare(method, optimizer, "mlp", dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "method",
    ["asl-fast", "asl+-fast", "feather-asl+", "str", "str-published", "probmask-fast"],
)
def test_what_is_learned_in_half_precision(method, dtype):
    """Thresholds and probabilities are float32, and so is all that they are computed from."""
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    compare(method, "sgd", "mlp", dtype=dtype, tolerance=tolerance)


def test_zero_is_a_value_like_any_other():
    """Only pruned weights have their gradient scaled, so a zero-initialised layer learns."""
    net = MODELS["mlp"].make()
    with torch.no_grad():
        net[2].weight.zero_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        net, optimizer, sparsity=0.5, total_steps=TOTAL, theta=0.0, begin=4, end=8
    )
    Loop(net, net, optimizer, MODELS["mlp"]).step(0)
    assert (sparsifier.latent_weights()["2.weight"] != 0).all()

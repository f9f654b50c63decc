"""Gradients that no tensor hook sees train the same network as those of backward(), or raise."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import torch_feather as feather
from torch_feather.errors import FeatherWarning, StateError

from .harness import RECIPES, Loop, Run, assert_same, snapshot, start
from .methods import METHODS

STEPS = 8
PULLED_BACK = ["feather", "str", "spartan", "probmask"]


def functional_gradients(run: Run, step: int, part: slice = slice(None)) -> dict:
    """Gradients with respect to copies of the parameters, by name."""
    x, y = run.case.batch(step)
    parameters = {name: p.detach() for name, p in run.model.named_parameters()}

    def loss(parameters):
        return F.cross_entropy(functional_call(run.model, parameters, (x[part],)), y[part])

    return grad(loss)(parameters)


class Functional(Loop):
    """A loop that never calls backward()."""

    def gradients(self, step: int) -> torch.Tensor:
        found = functional_gradients(self.run, step)
        for name, p in self.model.named_parameters():
            p.grad = found[name]
        if self.recipe.clip is not None:
            self.method.complete_gradients()
            both = [*self.model.parameters(), *self.method.parameters()]
            nn.utils.clip_grad_norm_(both, self.recipe.clip)
        return torch.zeros(())


def made(method: str, functional: bool, recipe: str = "plain", **options) -> Run:
    case = METHODS[method]
    options = {**case.options, **options}
    run = start(method=case.method, sparsity=case.sparsity, recipe=RECIPES[recipe], **options)
    if functional:
        run.loop.__class__, run.loop.run = Functional, run
    return run


def both(method: str, recipe: str = "plain", **options) -> tuple[Run, Run]:
    return tuple(made(method, functional, recipe, **options) for functional in (False, True))


@pytest.fixture
def _no_warning_of_assigned():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The gradients of", FeatherWarning)
        yield


usual = pytest.mark.usefixtures("_no_warning_of_assigned")


@usual
@pytest.mark.parametrize("recipe", ["plain", "clip", "step(closure)"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_torch_func_train_the_same_network(method, recipe):
    plain, functional = both(method, recipe)
    assert_same(*(snapshot(run.train(0, STEPS)) for run in (plain, functional)))
    own = [run.sparsifier.parameters() for run in (plain, functional)]
    assert_same(*own)


@usual
@pytest.mark.parametrize("method", PULLED_BACK)
def test_per_sample_gradients_train_the_same_network(method):
    plain, run = both(method, **({"theta": 0.5} if method == "feather" else {}))
    for step in range(STEPS):
        x, y = run.case.batch(step)
        parameters = {name: p.detach() for name, p in run.model.named_parameters()}

        def loss(parameters, x, y, model=run.model):
            return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

        samples = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
        for name, p in run.model.named_parameters():
            p.grad = samples[name].mean(0)
        run.optimizer.step()
        plain.loop.step(step)
    pair = zip(plain.model.parameters(), run.model.parameters(), strict=True)
    for a, b in pair:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@usual
def test_a_gradient_may_be_written_into_the_same_tensor_in_every_step():
    plain, run = both("feather", theta=0.5)
    buffers = {name: torch.zeros_like(p) for name, p in run.model.named_parameters()}
    for name, p in run.model.named_parameters():
        p.grad = buffers[name]
    for step in range(STEPS):
        plain.loop.step(step)
        for name, gradient in functional_gradients(run, step).items():
            buffers[name].copy_(gradient)
        run.optimizer.step()
    assert_same(snapshot(plain), snapshot(run))


@usual
def test_expanded_gradients_are_converted_too():
    plain, run = both("feather", theta=0.5)
    for step in range(3):
        for p in run.model.parameters():
            p.grad = torch.full((), 0.1 + step).expand(p.shape)
        plain.optimizer.zero_grad()
        sum(((0.1 + step) * p).sum() for p in plain.model.parameters()).backward()
        plain.optimizer.step()
        run.optimizer.step()
    assert_same(snapshot(plain), snapshot(run))


@usual
@pytest.mark.parametrize("functional", [False, True])
def test_a_second_step_on_the_same_gradients_uses_them_unchanged(functional):
    run = made("feather", functional, theta=0.5)
    run.train(0, 2)
    before = [p.grad.clone() for p in run.model.parameters()]
    run.optimizer.step()
    assert all(map(torch.equal, before, [p.grad for p in run.model.parameters()]))


@usual
def test_completing_twice_converts_once():
    plain, run = both("feather", theta=0.5)
    for step in range(STEPS):
        plain.loop.step(step)
        run.loop.gradients(step)
        run.sparsifier.complete_gradients()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1e6)  # writes, and changes nothing
        run.sparsifier.complete_gradients()
        run.optimizer.step()
    assert_same(snapshot(plain), snapshot(run))


def test_gradients_of_autograd_that_are_assigned_are_not_converted_again():
    """The hooks run in `torch.autograd.grad` too."""
    plain, run = both("feather", theta=0.5)
    for step in range(STEPS):
        plain.loop.step(step)
        x, y = run.case.batch(step)
        parameters = list(run.model.parameters())
        found = torch.autograd.grad(F.cross_entropy(run.model(x), y), parameters)
        for p, gradient in zip(parameters, found, strict=True):
            p.grad = gradient * 1.0
        run.optimizer.step()
    assert_same(snapshot(plain), snapshot(run))


def test_a_warning_says_once_how_assigned_gradients_are_taken():
    run = made("feather", True, theta=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(0, 4)
    [text] = [str(w.message) for w in caught if "assigned to .grad" in str(w.message)]
    assert text.startswith("The gradients of 0.weight, 2.weight were assigned")


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_layer_without_a_backward_pass_is_no_reason_for_a_warning(set_to_none):
    run = made("feather", False, theta=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            run.optimizer.zero_grad(set_to_none=set_to_none)
            x, _ = run.case.batch(step)
            (run.model if step % 2 == 0 else run.model[0])(x).square().mean().backward()
            run.optimizer.step()


def test_methods_that_leave_gradients_unchanged_need_no_conversion():
    plain, run = both("feather", theta=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (plain, run):
            one.train(0, STEPS)
    assert_same(snapshot(plain), snapshot(run))


def opacus_gradients(run: Run, step: int, own: bool) -> None:
    """What GradSampleModule, and with `own` also DPOptimizer, leave on the parameters."""
    raw = functional_gradients(run, step)
    run.loop.gradients(step)  # backward() fills .grad too
    for name, p in run.model.named_parameters():
        p.grad_sample = raw[name][None]
        if own:
            p.summed_grad = raw[name]
            p.grad = raw[name].clone()


def test_gradients_of_opacus_are_converted():
    plain, run = both("feather", theta=0.5)
    run.loop.__class__ = Loop
    for step in range(STEPS):
        plain.loop.step(step)
        opacus_gradients(run, step, own=True)
        run.optimizer.step()
    assert_same(snapshot(plain), snapshot(run))


def test_per_sample_gradients_of_unknown_use_are_an_error():
    run = made("feather", False, theta=0.5)
    opacus_gradients(run, 0, own=False)
    with pytest.raises(StateError, match=r"0\.weight has per-sample gradients"):
        run.optimizer.step()
    for p in run.model.parameters():
        p.grad_sample = None
    run.optimizer.step()


@usual
def test_assigned_gradients_of_several_passes_are_an_error():
    run = made("probmask", True)
    with pytest.raises(StateError, match="one of several passes"):  # noqa: PT012
        for number, _ in enumerate(run.sparsifier.passes(2)):
            found = functional_gradients(run, number)
            for name, p in run.model.named_parameters():
                p.grad = found[name] if p.grad is None else p.grad + found[name]


@usual
def test_a_gradient_is_converted_when_its_own_optimizer_steps():
    """Before that it may be incomplete: here the second half is added after the other step."""
    latents = []
    for halves in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
        optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.5) for i in (0, 2)]
        sparsifier = feather.sparsify(model, optimizers, sparsity=0.8, total_steps=6, theta=0.5)
        for step in range(6):
            gradients = [torch.full_like(p, 0.1 + step) for p in model.parameters()]
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            if halves:
                model[2].weight.grad /= 2
            optimizers[0].step()
            if halves:
                model[2].weight.grad += gradients[2] / 2
            optimizers[1].step()
        latents.append(sparsifier.latent_weights())
    assert_same(*latents)

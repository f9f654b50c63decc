"""Optimizers inside wrappers, copies of optimizers, and optimizers that replace each other."""

import copy
import gc
import io
import pickle
from collections import OrderedDict
from contextlib import suppress
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

import torch_feather as feather
from torch_feather.engine.wrappers import levels_of, plain_optimizer
from torch_feather.errors import ConfigurationError, FeatherWarning, StateError

from .harness import assert_same
from .optimizers import Delegating, TrustRatio

STEPS, HALF = 8, 4


# --- stand-ins for wrappers of frameworks -----------------------------------------------------


class Handle:
    """Hands on every attribute, as the wrappers of fastai do."""

    def __init__(self, optimizer):
        self.opt = optimizer

    def __getattr__(self, name):
        if name == "opt":
            raise AttributeError(name)
        return getattr(self.opt, name)


class Imitation:
    """Takes the class of the optimizer and hands on its attributes, as those of Lightning do."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__ = type("Imitated" + kind.__name__, (self.__class__, kind), {})

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self.optimizer.step(*[] if closure is None else [closure])

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Every(Delegating):
    """Steps only every second time, as when gradients are accumulated."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure) if self.calls % 2 == 0 else None


class Pulled(Optimizer):
    """Has hooks, but none for states; halves each update after the step of the optimizer inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._patch_step_function()

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        self.optimizer.step(closure)
        for p, old in zip(parameters, before, strict=True):
            p.lerp_(old, 0.5)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


WRAPPERS = [Handle, Imitation, Delegating, TrustRatio, Pulled]


def make(wrapper=None, method="feather", attach="wrapper", **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer = inner if wrapper is None else wrapper(inner)
    settings = {"sparsity": 0.5, "total_steps": STEPS} | settings
    sparsifier = feather.sparsify(
        model, outer if attach == "wrapper" else inner, method, **settings
    )
    return model, outer, inner, sparsifier


def gradients(model, step):
    random = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 8, generator=random), torch.randint(4, (16,), generator=random)
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        gradients(model, step)
        optimizer.step()


def values(model, sparsifier):
    return [p.detach().clone() for p in model.parameters()], sparsifier.latent_weights()


# --- wrappers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["feather", "str", "spartan"])
@pytest.mark.parametrize("wrapper", [Handle, Imitation, Delegating])
def test_a_wrapper_that_only_hands_on_trains_as_the_optimizer_inside(wrapper, method):
    model, outer, _, sparsifier = make(wrapper, method)
    train(model, outer, 0, STEPS)
    plain, optimizer, _, expected = make(None, method)
    train(plain, optimizer, 0, STEPS)
    assert sparsifier.step_count == STEPS
    assert_same(values(model, sparsifier), values(plain, expected))


@pytest.mark.parametrize("load", ["wrapper", "inside"])
@pytest.mark.parametrize("save", ["wrapper", "inside"])
@pytest.mark.parametrize(
    ("wrapper", "attach"),
    [*product(WRAPPERS, ["wrapper"]), *product([Handle, Imitation, Delegating], ["inside"])],
)
def test_a_checkpoint_resumes_through_wrapper_and_inside(wrapper, attach, save, load):
    model, outer, inner, sparsifier = make(wrapper, attach=attach)
    train(model, outer, 0, HALF)
    file = io.BytesIO()
    torch.save([model.state_dict(), (outer if save == "wrapper" else inner).state_dict()], file)
    train(model, outer, HALF, STEPS)

    resumed, other, within, again = make(wrapper, attach=attach)
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(weights)
    (other if load == "wrapper" else within).load_state_dict(state)
    assert again.step_count == HALF
    foreign = [k for own in within.state.values() for k in own if k.startswith("feather")]
    assert not foreign
    train(resumed, other, HALF, STEPS)
    assert_same(values(resumed, again), values(model, sparsifier))
    assert feather.sparsity(again.finalize()) == 0.5


@pytest.mark.parametrize("method", ["feather", "str", "spartan"])
def test_a_wrapper_may_skip_steps_which_do_not_count(method):
    model, outer, _, sparsifier = make(Every, method)
    plain, optimizer, _, expected = make(None, method)
    for step in range(STEPS):
        gradients(model, step)
        outer.step()
        assert sparsifier.step_count == (step + 1) // 2
        if step % 2 == 1:
            gradients(plain, step)
            optimizer.step()
    assert_same(values(model, sparsifier), values(plain, expected))


def test_a_wrapper_that_steps_an_optimizer_with_a_sparsifier_is_an_error():
    model, outer, _, sparsifier = make(Pulled, attach="inside")
    gradients(model, 0)
    with pytest.raises(
        StateError, match=r"Pulled wraps the optimizer .* Pass the Pulled to sparsify"
    ):
        outer.step()
    assert sparsifier.step_count == 0


def test_a_wrapper_sees_latent_weights_and_a_closure_effective_ones():
    model, outer, _, sparsifier = make(TrustRatio, schedule="constant")
    seen = []

    def closure():
        seen.append(feather.sparsity(model))
        return gradients(model, 0)

    outer.step(closure)
    assert seen == [0.5]
    assert sparsifier.step_count == 1
    assert feather.sparsity(model) == 0.5


@pytest.mark.parametrize("wrapper", [Delegating, TrustRatio, Pulled])
def test_a_step_that_raises_in_the_optimizer_inside_leaves_a_sparse_model(wrapper):
    model, outer, inner, sparsifier = make(wrapper, schedule="constant")
    train(model, outer, 0, 2)
    before = values(model, sparsifier)
    handle = inner.register_step_pre_hook(lambda *_: 1 / 0)
    gradients(model, 2)
    with pytest.raises(ZeroDivisionError):
        outer.step()
    assert_same(values(model, sparsifier), before)
    handle.remove()
    train(model, outer, 2, 4)
    assert sparsifier.step_count == 4
    assert feather.sparsity(model) == 0.5


def test_a_step_that_a_wrapper_gives_up_does_not_count():
    class Tolerant(Delegating):
        def step(self, closure=None):
            with suppress(ZeroDivisionError):
                super().step(closure)

    model, outer, inner, sparsifier = make(Tolerant, schedule="constant")
    handle = inner.register_step_pre_hook(lambda *_: 1 / 0)
    train(model, outer, 0, 2)
    assert sparsifier.step_count == 0
    handle.remove()
    train(model, outer, 2, 4)
    assert sparsifier.step_count == 2
    assert feather.sparsity(model) == 0.5


@pytest.mark.parametrize("base", [object, Optimizer])
def test_a_wrapper_of_several_optimizers_is_an_error_that_asks_for_them(base):
    def init(self, *optimizers):
        self.optimizers = optimizers

    groups = property(lambda self: [g for o in self.optimizers for g in o.param_groups])
    members = {"__init__": init, "param_groups": groups, "step": lambda self: None}
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    both = type("Both", (base,), members)(
        *[torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    )
    with pytest.raises(ConfigurationError, match=r"Both.* [Pp]ass (the optimizers|these)"):
        feather.sparsify(model, both, sparsity=0.5, total_steps=2)
    feather.sparsify(model, both.optimizers, sparsity=0.5, total_steps=2)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_released_wrapper_is_as_before(wrapper):
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = wrapper(inner)
    before = [(dict(vars(o)), o.step) for o in (outer, inner)]
    sparsifier = feather.sparsify(model, outer, sparsity=0.5, total_steps=2)
    model(torch.ones(1, 8)).sum().backward()
    outer.step()
    sparsifier.detach()
    for optimizer, (attributes, step) in zip((outer, inner), before, strict=True):
        assert vars(optimizer).keys() == attributes.keys()
        assert optimizer.step == step
        assert not inner._optimizer_step_pre_hooks
        assert not inner._optimizer_state_dict_post_hooks
    assert "feather_latent" not in str(inner.state_dict())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_fixed_masks_hold_under_a_wrapper(wrapper):
    model, outer, _, sparsifier = make(wrapper)
    train(model, outer, 0, STEPS)
    sparsifier.finalize(keep_masks=True)
    train(model, outer, 0, 2)
    assert feather.sparsity(model) == 0.5
    sparsifier.detach()
    feather.keep_zeros(model, outer)
    train(model, outer, 2, 4)
    assert feather.sparsity(model) == 0.5


def test_a_state_dict_of_another_format_is_an_error_that_says_so():
    class Listed(Delegating):
        def state_dict(self):
            return {"groups": [1, 2]}

    model, outer, _, _ = make(Listed)
    train(model, outer, 0, 1)
    with pytest.raises(StateError, match="Listed does not have the format"):
        outer.state_dict()


def test_the_levels_of_a_wrapper_end_at_the_optimizer_inside():
    inner = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    outer = TrustRatio(Delegating(inner))
    assert [type(level) for level in levels_of(Handle(outer))][1:] == [
        TrustRatio, Delegating, torch.optim.SGD
    ]  # fmt: skip
    assert plain_optimizer(Imitation(outer)) is inner


# --- copies -----------------------------------------------------------------------------------


def through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def through_torch(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def swapped(pair):
    return copy.deepcopy(pair[::-1])[::-1]


COPIES = [copy.deepcopy, through_pickle, through_torch, swapped]


@pytest.mark.parametrize("wrapper", [None, Handle, Delegating, TrustRatio])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_raises_at_its_first_step_and_leaves_the_original_alone(way, wrapper):
    model, outer, _, sparsifier = make(wrapper)
    train(model, outer, 0, HALF)
    before = values(model, sparsifier)
    twin, its = way((model, outer))
    gradients(twin, HALF)
    with pytest.raises(StateError, match=r"sparsify"):
        its.step()
    assert_same(values(model, sparsifier), before)
    train(model, outer, HALF, STEPS)
    assert feather.sparsity(sparsifier.finalize()) == 0.5


@pytest.mark.parametrize("wrapper", [None, Handle, Delegating, TrustRatio])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("method", ["feather", "str"])
def test_a_copy_trains_on_bit_for_bit_after_sparsify(method, way, wrapper):
    model, outer, _, sparsifier = make(wrapper, method)
    train(model, outer, 0, HALF)
    twin, its = way((model, outer))
    again = feather.sparsify(twin, its, method, sparsity=0.5, total_steps=STEPS)
    assert again.step_count == HALF
    train(twin, its, HALF, STEPS)
    train(model, outer, HALF, STEPS)
    assert_same(values(twin, again), values(model, sparsifier))


def test_a_copy_of_a_finalized_pair_is_a_plain_one():
    model, optimizer, _, sparsifier = make()
    train(model, optimizer, 0, STEPS)
    sparsifier.finalize()
    twin, its = copy.deepcopy((model, optimizer))
    train(twin, its, 0, 1)
    assert feather.sparsity(twin) < 0.5


def test_a_state_of_a_sparse_run_in_a_plain_optimizer_raises_at_the_first_step():
    """Population-based training that exchanges state dicts."""
    model, optimizer, _, sparsifier = make()
    train(model, optimizer, 0, HALF)
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gradients(twin, HALF)
    with pytest.raises(StateError, match="saved by a run with a sparsifier"):
        other.step()
    again = feather.sparsify(twin, other, sparsity=0.5, total_steps=STEPS)
    train(twin, other, HALF, STEPS)
    train(model, optimizer, HALF, STEPS)
    assert_same(values(twin, again), values(model, sparsifier))


# --- optimizers that replace each other -------------------------------------------------------


def test_an_optimizer_made_anew_raises_at_its_first_step_and_the_advice_works():
    model, optimizer, _, sparsifier = make()
    train(model, optimizer, 0, HALF)
    before = values(model, sparsifier)
    other = torch.optim.Adam(model.parameters(), lr=0.01)
    gradients(model, HALF)
    with pytest.raises(StateError, match=r"This Adam would step 0\.weight, 2\.weight"):
        other.step()
    assert_same(values(model, sparsifier), before)

    state = sparsifier.state_dict()
    sparsifier.detach()
    other = torch.optim.Adam(model.parameters(), lr=0.01)
    again = feather.sparsify(model, other, sparsity=0.5, total_steps=STEPS)
    again.load_state_dict(state)
    assert_same(values(model, again), before)
    train(model, other, HALF, STEPS)
    assert again.step_count == STEPS
    assert feather.sparsity(again.finalize()) == 0.5


def test_an_optimizer_made_anew_is_noticed_after_the_old_one_is_gone():
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.collect()
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(StateError, match="deleted with another optimizer"):
        optimizer.step()


@pytest.mark.parametrize("dense", [False, True])
def test_after_an_optimizer_is_deleted_training_goes_on_as_its_error_advises(dense):
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=STEPS, schedule="one-shot")
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    effective = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.collect()
    with pytest.warns(FeatherWarning, match=r"sparsifier of weight was deleted .*latent weights"):
        sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=STEPS)
    assert torch.equal(sparsifier.latent_weights()["weight"], effective)
    if dense:
        sparsifier.detach()
    for _ in range(STEPS):
        model(torch.ones(1, 8)).square().sum().backward()
        optimizer.step()
    assert (model.weight == 0).sum() == (0 if dense else 16)


def test_other_models_and_optimizers_are_left_alone():
    critic = nn.Linear(4, 1)
    other = torch.optim.SGD(critic.parameters(), lr=0.1)
    critic(torch.ones(1, 4)).sum().backward()
    other.step()
    model, optimizer, _, sparsifier = make()
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        other.step()
    bias = torch.optim.SGD([critic.bias], lr=0.1)
    bias.add_param_group({"params": [model[2].weight]})
    with pytest.raises(StateError, match=r"2\.weight"):
        bias.step()
    sparsifier.finalize()
    bias.step()


def test_nothing_watches_optimizers_when_no_sparsifier_is_left():
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    from torch_feather.engine.binding import attached

    gc.collect()
    for thing in list(attached):
        attached.pop(thing, None)  # of other tests that did not end their training
    _, _, _, sparsifier = make()
    watching = len(_global_optimizer_pre_hooks)
    sparsifier.detach()
    assert len(_global_optimizer_pre_hooks) == watching - 1


# --- several optimizers that step unequally often ---------------------------------------------


def gan(order, total_steps):
    """A generator, a critic that steps five times as often, and the sparsifier of both."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"g": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    made = {name: torch.optim.Adam(model[name].parameters(), lr=0.01) for name in "gc"}
    sparsifier = feather.sparsify(
        model, [made[name] for name in order], sparsity=0.5, total_steps=total_steps
    )

    def step(name):
        model.zero_grad()
        model["c"](model["g"](torch.ones(1, 8))).square().sum().backward()
        made[name].step()

    return model, sparsifier, step


def test_the_schedule_counts_the_steps_of_the_last_optimizer():
    _, sparsifier, step = gan("cg", total_steps=10)
    for iteration in range(10):
        for _ in range(5):
            step("c")
        assert sparsifier.step_count == iteration
        step("g")
    assert sparsifier.step_count == 10
    assert feather.sparsity(sparsifier.finalize()) == 0.5


def test_a_surplus_step_of_an_optimizer_that_steps_more_often_is_an_error():
    _, sparsifier, step = gan("gc", total_steps=10)
    for iteration in range(2):
        for _ in range(5):
            step("c")
            if iteration == 1 and sparsifier.step_count == 10:
                break
        else:
            step("g")
    with pytest.raises(StateError, match=r"all of its 10 steps.*Adam \(0\) 1 times, Adam \(1\) 10"):
        step("c")
    assert sparsifier.step_count == 10


def test_all_steps_of_the_more_frequent_optimizer_may_be_counted():
    _, sparsifier, step = gan("gc", total_steps=50)
    for _ in range(10):
        for _ in range(5):
            step("c")
        step("g")
    assert sparsifier.step_count == 50
    assert feather.sparsity(sparsifier.finalize()) == 0.5


def test_an_unfinished_schedule_of_unequal_optimizers_says_what_is_counted():
    _, sparsifier, step = gan("cg", total_steps=50)
    for _ in range(10):
        for _ in range(5):
            step("c")
        step("g")
    with pytest.raises(
        StateError, match=r"After 10 of 50 steps.*Adam \(0\) 50 times, Adam \(1\) 10"
    ):
        sparsifier.finalize()


def test_optimizers_that_step_equally_often_may_go_beyond_the_schedule():
    _, sparsifier, step = gan("gc", total_steps=3)
    for _ in range(9):
        step("g")
        step("c")
    assert sparsifier.step_count == 9


# --- optimizers that cannot work --------------------------------------------------------------


def deepspeed(name, module="deepspeed.runtime.zero.stage_1_and_2"):
    """An optimizer of DeepSpeed's engine: no torch optimizer; holds one, on flat copies."""

    class Engine:
        def __init__(self, optimizer):
            flat = torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]])
            self.optimizer = torch.optim.SGD([nn.Parameter(flat)], lr=0.1)

        param_groups = property(lambda self: self.optimizer.param_groups)

        def step(self, closure=None):
            self.optimizer.step()

    return type(name, (Engine,), {"__module__": module})


@pytest.mark.parametrize("outer", [None, Handle, Delegating])
@pytest.mark.parametrize(
    "name", ["BF16_Optimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "Another"]
)
def test_optimizers_of_deepspeed_are_an_error_that_names_the_alternative(name, outer):
    model = nn.Linear(8, 4)
    optimizer = deepspeed(name)(torch.optim.SGD(model.parameters(), lr=0.1))
    if outer is not None:
        optimizer = outer(optimizer)
    with pytest.raises(ConfigurationError, match=rf"{name} is not supported.*fully_shard"):
        feather.sparsify(model, optimizer, sparsity=0.5, total_steps=2)


def test_plain_optimizers_of_deepspeed_are_optimizers():
    model = nn.Linear(8, 4)
    kind = type("FusedAdam", (torch.optim.Adam,), {"__module__": "deepspeed.ops.adam.fused_adam"})
    optimizer = kind(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=2)


class Curved(torch.optim.SGD):
    """Differentiates the gradients in its step, as SophiaH and AdaHessian do."""

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            curvature = torch.autograd.grad([p.grad.sum() for p in parameters], parameters)
        for p, h in zip(parameters, curvature, strict=True):
            p.sub_(0.1 * p.grad / (h.abs() + 1))


def test_second_derivatives_inside_a_step_are_an_error_that_says_why():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = Curved(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, sparsity=0.5, total_steps=2, schedule="constant"
    )
    before = values(model, sparsifier)
    model(torch.ones(2, 8)).square().mean().backward(create_graph=True)
    with pytest.raises(StateError, match="Curved differentiates the gradients inside step"):
        optimizer.step()
    assert_same(values(model, sparsifier), before)
    assert sparsifier.step_count == 0


@pytest.mark.parametrize("name", ["LOMO", "AdaLOMO", "SafeFP16Optimizer", "FP16_Optimizer"])
def test_optimizers_that_do_not_train_the_weights_in_their_step_are_an_error(name):
    model = nn.Linear(8, 4)
    optimizer = type(name, (torch.optim.SGD,), {})(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=rf"^{name} is not supported"):
        feather.sparsify(model, optimizer, sparsity=0.5, total_steps=2)


def test_a_model_that_is_evaluated_by_the_optimizer_is_an_error():
    class Evaluating(torch.optim.SGD):
        def set_closure(self, *arguments):
            self.arguments = arguments

    model = nn.Linear(8, 4)
    optimizer = Evaluating(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=2)
    with pytest.raises(StateError, match=r"optimizer\.step\(closure\)"):
        optimizer.set_closure(F.cross_entropy, None, None)


class Counting(torch.optim.SGD):
    """Keeps entries in its state that belong to no parameter, as SPAM and TRAC do."""

    @torch.no_grad()
    def step(self, closure=None):
        self.state["total"] = self.state.get("total", 0) + 1
        self.state["shared"] = {"scale": torch.ones(1)}
        for group in self.param_groups:
            group["lr"] = 0.1 / self.state["total"]
        super().step(closure)


def test_entries_of_a_state_that_belong_to_no_parameter_resume():
    def begin():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = Counting(model.parameters(), lr=0.1, momentum=0.9)
        return (
            model,
            optimizer,
            feather.sparsify(model, optimizer, sparsity=0.5, total_steps=STEPS),
        )

    model, optimizer, sparsifier = begin()
    train(model, optimizer, 0, HALF)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    assert saved[1]["state"]["total"] == HALF
    resumed, other, again = begin()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, HALF, STEPS)
    train(model, optimizer, HALF, STEPS)
    assert other.state["total"] == STEPS
    assert_same(values(resumed, again), values(model, sparsifier))


# --- frameworks -------------------------------------------------------------------------------


@pytest.mark.apps
@pytest.mark.parametrize("attach", ["wrapper", "inside"])
def test_fabric_resumes_bit_for_bit(attach, tmp_path):
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=1)

    def begin():
        torch.manual_seed(0)
        model = fabric.setup(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
        optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=0.01))
        given = optimizer if attach == "wrapper" else optimizer.optimizer
        return model, optimizer, feather.sparsify(model, given, sparsity=0.5, total_steps=STEPS)

    model, optimizer, sparsifier = begin()
    train(model, optimizer, 0, HALF)
    fabric.save(tmp_path / "c.ckpt", {"model": model, "optimizer": optimizer})
    train(model, optimizer, HALF, STEPS)
    resumed, other, again = begin()
    fabric.load(tmp_path / "c.ckpt", {"model": resumed, "optimizer": other})
    assert again.step_count == HALF
    train(resumed, other, HALF, STEPS)
    assert_same(values(resumed, again), values(model, sparsifier))


@pytest.mark.apps
def test_the_wrapper_of_lightnings_trainer_is_looked_through():
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = LightningOptimizer(optimizer)
    sparsifier = feather.sparsify(model, wrapper, sparsity=0.5, total_steps=2)
    assert sparsifier.step.optimizers[0].optimizer is optimizer
    assert "load_state_dict" not in vars(wrapper)


# --- parameters that change their position ------------------------------------------------------


def by_layer(*layers):
    return torch.optim.SGD([{"params": list(layer.parameters())} for layer in layers], lr=0.1)


def swap_groups(optimizer):
    optimizer.param_groups.reverse()


def swap_within_a_group(optimizer):
    optimizer.param_groups[0]["params"].reverse()


def remove_the_first(optimizer):
    del optimizer.param_groups[0]["params"][0]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("change", [swap_groups, swap_within_a_group, remove_the_first])
def test_parameters_that_change_their_position_raise_before_a_step(change, grouped):
    """Otherwise layers of one shape would get the latent weights of each other."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    parts = (model[:2], model[2:]) if grouped else (model,)
    if change is swap_groups and not grouped:
        parts = tuple(model)
    optimizer = by_layer(*parts)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=STEPS)
    train_square(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    saved = [list(group["params"]) for group in optimizer.param_groups]
    groups = list(optimizer.param_groups)
    change(optimizer)
    with pytest.raises(StateError, match=r"reordered, or some were removed|no longer holds"):
        train_square(model, optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.param_groups[:] = groups
    for group, params in zip(optimizer.param_groups, saved, strict=True):
        group["params"] = params
    train_square(model, optimizer, STEPS - 1)
    assert feather.sparsity(sparsifier.finalize()) == 0.5


def train_square(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()


def test_an_optimizer_that_is_initialized_again_raises_at_its_first_step():
    model, optimizer, _, sparsifier = make()
    train(model, optimizer, 0, HALF)
    before = values(model, sparsifier)
    optimizer.__init__(model.parameters(), lr=0.1)
    gradients(model, HALF)
    with pytest.raises(StateError, match="step hooks of this SGD were removed"):
        optimizer.step()
    assert_same(values(model, sparsifier), before)

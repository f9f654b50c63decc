"""How sparse training ends: plain modules, plain keys, exact zeros, nothing left behind."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import torch_feather as feather
from torch_feather.errors import StateError

from .harness import RECIPES, STEPS, TOTAL, assert_same, start
from .methods import METHODS
from .models import MODELS
from .optimizers import OPTIMIZERS

HOOKS = [
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
]


def assert_nothing_left(run) -> None:
    """Model and optimizer have no trace of a sparsifier."""
    plain = run.case.make()
    assert list(run.model.state_dict()) == list(plain.state_dict())
    pairs = zip(run.model.modules(), plain.modules(), strict=True)
    for module, other in pairs:
        assert type(module) is type(other)
        assert vars(module).keys() == vars(other).keys()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                     "_state_dict_hooks", "_load_state_dict_pre_hooks"):  # fmt: skip
            assert not getattr(module, kind)
    for p in run.model.parameters():
        assert not p._backward_hooks
        assert not p._post_accumulate_grad_hooks
        assert not [name for name in vars(p) if "feather" in name]
    for optimizer in run.optimizers:
        assert not [hooks for hooks in HOOKS if getattr(optimizer, hooks)]
        assert "step" not in vars(optimizer)
        for state in optimizer.state_dict()["state"].values():
            assert not [key for key in state if "feather" in str(key)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw-fused", "muon+adamw", "lbfgs"])
def test_finalize_leaves_plain_modules_plain_keys_and_no_hooks(optimizer, model):
    run = start(model, optimizer, theta=0.5).train(0, STEPS)
    parameters = list(run.model.parameters())
    assert run.sparsifier.finalize() is run.model
    assert_nothing_left(run)
    assert all(p is q for p, q in zip(parameters, run.model.parameters(), strict=True))
    assert run.zeros() == round(0.8 * run.case.size)


@pytest.mark.parametrize("method", METHODS)
def test_finalize_keeps_the_evaluated_model(method):
    case = METHODS[method]
    run = start("convnet", method=case.method, sparsity=case.sparsity, **case.options)
    run.train(0, TOTAL).model.eval()
    x, _ = run.case.batch(60)
    with torch.no_grad():
        before, state = run.model(x), copy.deepcopy(run.model.state_dict())
        run.sparsifier.finalize()
        assert torch.equal(run.model(x), before)
    assert_same(run.model.state_dict(), state)
    assert run.zeros() == round(case.sparsity * run.case.size)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_finalize_before_the_target_is_an_error(steps):
    run = start().train(0, steps)
    zeros = run.zeros()
    with pytest.raises(StateError, match=r"(?s)0\.8.*force=True"):
        run.sparsifier.finalize()
    # It went on as if nothing had been asked.
    assert run.train(steps, steps + 1).sparsifier.step_count == steps + 1
    assert run.zeros() > zeros
    assert run.sparsifier.finalize(force=True) is run.model
    assert_nothing_left(run)


def test_finalize_is_possible_from_the_end_of_the_schedule_on():
    """The ramp ends at half of training; from there on the model has its target sparsity."""
    run = start().train(0, TOTAL // 2)
    run.sparsifier.finalize()
    assert run.zeros() == 96


def test_a_finalized_model_trains_like_a_plain_dense_one():
    run = start().train(0, STEPS)
    run.sparsifier.finalize()
    plain = MODELS["mlp"].make(3)
    plain.load_state_dict(run.model.state_dict())
    optimizer = OPTIMIZERS["sgd-momentum"](plain)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    from .harness import Loop

    loop = Loop(plain, plain, optimizer, run.case)
    for step in range(3):
        run.loop.step(step)
        loop.step(step)
    assert_same(list(run.model.parameters()), list(plain.parameters()))
    assert run.zeros() < 96


MASKED = ["sgd", "sgd-momentum", "sgd-nesterov", "sgd-groups", "sgd-nested", "adamw", "adamw-fused",
          "adamw-foreach", "rmsprop", "adafactor", "muon+adamw", "lion (pytorch_optimizer)",
          "prodigy (prodigyopt)"]  # fmt: skip


@pytest.mark.parametrize("optimizer", [name for name in MASKED if name in OPTIMIZERS])
def test_kept_masks_hold_in_further_training(optimizer):
    """Momentum and moments of pruned weights must not bring them back."""
    run = start("convnet", optimizer).train(0, STEPS)
    masks = run.sparsifier.masks()
    before = {n: p.detach().clone() for n, p in run.case.weights(run.model).items()}
    assert run.sparsifier.finalize(keep_masks=True) is run.model
    for step in range(STEPS):
        run.train(step, step + 1)
        for name, p in run.case.weights(run.model).items():
            assert (p[~masks[name]] == 0).all(), name
    for name, p in run.case.weights(run.model).items():
        if masks[name].any():
            assert not torch.equal(p, before[name])


@pytest.mark.parametrize("form", ["step(closure)", "step(closure=...)"])
def test_kept_masks_hold_under_closures(form):
    run = start("mlp", "sgd-momentum", recipe=RECIPES[form]).train(0, STEPS)
    run.sparsifier.finalize(keep_masks=True)
    zeros = run.zeros()
    run.train(0, 4)
    assert run.zeros() == zeros == 96


def test_a_kept_mask_saves_plain_states():
    run = start().train(0, STEPS)
    run.sparsifier.finalize(keep_masks=True)
    run.train(0, 2)
    assert list(run.model.state_dict()) == list(run.case.make().state_dict())
    for state in run.optimizer.state_dict()["state"].values():
        assert not [key for key in state if "feather" in str(key)]


def test_detach_gives_the_latent_weights_back():
    run = start("convnet").train(0, STEPS)
    latent = run.sparsifier.latent_weights()
    run.sparsifier.detach()
    assert_nothing_left(run)
    assert_same({n: p.detach() for n, p in run.case.weights(run.model).items()}, latent)
    run.train(0, 2)
    assert run.zeros() == 0


@pytest.mark.parametrize("leave", ["finalize", "detach"])
def test_a_model_can_be_sparsified_again(leave):
    run = start().train(0, STEPS)
    getattr(run.sparsifier, leave)()
    sparsifier = feather.sparsify(
        run.model, run.optimizer, sparsity=0.9, total_steps=4, schedule="constant"
    )
    run.train(0, 3)
    assert sparsifier.step_count == 3
    assert run.zeros() == 108


@pytest.mark.parametrize("first", ["finalize", "detach"])
def test_finalizing_afterwards_is_a_clear_error(first):
    run = start().train(0, STEPS)
    getattr(run.sparsifier, first)()
    with pytest.raises(StateError, match=r"finalized|detached"):
        run.sparsifier.finalize()


def test_detach_releases_kept_masks_and_leaves_the_sparse_model():
    run = start().train(0, STEPS)
    run.sparsifier.finalize(keep_masks=True)
    run.train(0, 2)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.sparsifier.detach()
    assert_same([p.detach() for p in run.model.parameters()], before)
    assert_nothing_left(run)
    run.train(2, 4)
    assert run.zeros() < 96


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("leave", ["finalize", "detach"])
def test_a_learning_rate_scheduler_survives(leave, when):
    case = MODELS["mlp"]
    net = case.make()
    optimizer = OPTIMIZERS["sgd-momentum"](net)
    make = lambda: CosineAnnealingLR(optimizer, 20)  # noqa: E731
    scheduler = make() if when == "before" else None
    sparsifier = feather.sparsify(net, optimizer, sparsity=0.8, total_steps=4)
    scheduler = scheduler or make()
    from .harness import Loop, Run

    run = Run(net, optimizer, sparsifier, Loop(net, net, optimizer, case), case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            run.train(step, step + 1)
            scheduler.step()
        getattr(sparsifier, leave)()
        before = [p.detach().clone() for p in net.parameters()]
        for step in range(3):
            run.train(step, step + 1)
            scheduler.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not [hooks for hooks in HOOKS if getattr(optimizer, hooks)]


def test_hooks_of_the_user_stay():
    run, seen = start(), []
    run.optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    run.model[0].weight.register_hook(lambda g: seen.append("gradient"))
    run.train(0, STEPS)
    run.sparsifier.finalize()
    seen.clear()
    run.train(0, 1)
    assert seen == ["gradient", "step"]


@pytest.mark.parametrize("leave", ["finalize", "detach"])
def test_nothing_keeps_the_sparsifier_or_its_latents_alive(leave):
    run = start(theta=0.5).train(0, STEPS)
    getattr(run.sparsifier, leave)()
    dying = weakref.ref(run.sparsifier)
    run.sparsifier = run.loop.method = None
    gc.collect()
    assert dying() is None


def test_a_sparsifier_without_references_keeps_working():
    """The optimizer keeps the sparsifier alive."""
    run = start()
    run.sparsifier = run.loop.method = None
    gc.collect()
    run.train(0, STEPS)
    assert run.zeros() == 96


@pytest.mark.parametrize("method", METHODS)
def test_a_written_model_at_the_target_is_kept(method):
    """As in frameworks that load their best checkpoint after training."""
    case = METHODS[method]
    settings = {"method": case.method, "sparsity": case.sparsity, **case.options}
    best = start(seed=1, **settings).train(0, TOTAL).sparsifier.finalize().state_dict()
    run = start(**settings).train(0, TOTAL)
    assert run.sparsifier.at_target
    run.model.load_state_dict(best)
    assert_same(run.sparsifier.finalize().state_dict(), best)
    assert run.sparsifier.sparsity == run.zeros() / run.case.size


def written_in_too_early():
    """A finished run into which its own earlier, denser weights were written; and these."""
    run = start(method="hard-ste").train(0, 2)
    early = copy.deepcopy(run.model.state_dict())
    run.train(2, TOTAL).model.load_state_dict(early)
    return run, early


def test_a_denser_written_model_is_pruned_with_a_warning():
    run, _ = written_in_too_early()
    with pytest.warns(feather.errors.FeatherWarning, match=r"\d+ zeros, expected 96"):
        run.sparsifier.finalize()
    assert run.zeros() == 96


def test_a_denser_written_model_is_pruned_alone_after_a_reset():
    run, early = written_in_too_early()
    run.sparsifier.reset_latents()
    for name, value in run.sparsifier.finalize().state_dict().items():
        assert ((value == early[name]) | (value == 0)).all()
    assert run.zeros() == 96


@pytest.mark.parametrize("order", ["written, moved", "moved, written"])
@pytest.mark.parametrize(
    "move",
    [lambda net: net.to(memory_format=torch.channels_last), lambda net: net.double()],
    ids=["channels last", "float64"],
)
def test_a_written_model_is_kept_if_it_was_moved_too(move, order):
    best = start("convnet", seed=1).train(0, TOTAL).sparsifier.finalize().state_dict()
    run = start("convnet").train(0, TOTAL)
    steps = [lambda: run.model.load_state_dict(best), lambda: move(run.model)]
    for step in steps if order == "written, moved" else reversed(steps):
        step()
    found = run.sparsifier.finalize().state_dict()
    assert all(torch.equal(value.to(best[name]), best[name]) for name, value in found.items())


def test_at_target_is_from_the_step_on_that_reaches_it():
    run, seen = start(), []
    assert not run.sparsifier.at_target
    for step in range(TOTAL):
        run.train(step, step + 1)
        exact = run.zeros() == round(0.8 * run.case.size)
        seen.append(run.sparsifier.at_target)
        assert seen[-1] == exact
    assert set(seen) == {False, True}
    run.sparsifier.finalize()
    assert run.sparsifier.at_target


@pytest.mark.parametrize(
    "leave", [lambda s: s.detach(), lambda s: s.finalize(force=True)], ids=["detach", "force"]
)
def test_a_run_that_ended_before_its_target_is_not_at_target(leave):
    run = start().train(0, 2)
    leave(run.sparsifier)
    assert not run.sparsifier.at_target
    assert run.zeros() < round(0.8 * run.case.size)

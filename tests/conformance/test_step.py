"""One optimizer step, however it is called and however it ends."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import torch_feather as feather
from torch_feather.errors import StateError

from .harness import RECIPES, STEPS, TOTAL, Loop, Run, assert_exact, assert_same, snapshot, start
from .models import MODELS
from .optimizers import FUSED, OPTIMIZERS, SELECTED, NestedSGD, as_list


def attach(optimizer_class, model: str = "mlp", **settings) -> Run:
    """A run whose optimizer is of a class made for the test."""
    case = MODELS[model]
    net = case.make()
    optimizer = optimizer_class(net.parameters(), lr=0.1)
    settings = {"sparsity": 0.8, "total_steps": TOTAL} | settings
    sparsifier = feather.sparsify(net, optimizer, **settings)
    return Run(net, optimizer, sparsifier, Loop(net, net, optimizer, case), case)


# --- closures -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["step(closure)", "step(closure=...)"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_closure_sees_the_sparse_model_and_its_loss_comes_back(optimizer, form):
    recipe = RECIPES[form]
    run = start(optimizer=optimizer, recipe=recipe, schedule="constant")
    seen = []
    run.loop.forward = lambda x: (seen.append(run.zeros()), run.model(x))[1]
    run.train(0, 3)
    assert set(seen) == {96}
    assert len(seen) >= 3
    first = run.optimizers[0]
    with torch.no_grad():
        expected = F.cross_entropy(run.model(run.case.batch(3)[0]), run.case.batch(3)[1])
    closure = lambda: run.loop.gradients(3)  # noqa: E731
    loss = first.step(closure) if form == "step(closure)" else first.step(closure=closure)
    # The loss of the sparse model at the point where the step began.
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("optimizer", [n for n in SELECTED])
@pytest.mark.parametrize("form", ["step(closure)", "step(closure=...)"])
def test_closures_take_the_same_steps_as_plain_calls(optimizer, form):
    plain = start("convnet", optimizer).train(0, STEPS)
    closed = start("convnet", optimizer, recipe=RECIPES[form]).train(0, STEPS)
    assert_same(snapshot(plain), snapshot(closed))


def test_a_closure_sees_a_consistent_sparsifier():
    run = start(schedule="constant")

    def closure():
        assert_exact(run)
        latents.append(run.sparsifier.latent_weights()["0.weight"])
        run.save()
        return run.loop.gradients(0)

    latents = [run.sparsifier.latent_weights()["0.weight"]]
    other = start(schedule="constant", recipe=RECIPES["step(closure)"]).train(0, 1)
    run.optimizer.step(closure)
    assert torch.equal(*latents)
    assert_same(snapshot(run), snapshot(other))


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("optimizer", SELECTED)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_closure_that_raises_leaves_everything_unchanged(optimizer, keyword, error):
    run, other = (start("mlp", optimizer).train(0, 3) for _ in range(2))
    first = run.optimizers[0]

    def closure():
        run.loop.gradients(3)
        raise error

    before = snapshot(run)
    with pytest.raises(error):
        first.step(closure=closure) if keyword else first.step(closure)
    assert_same(before, snapshot(run))
    assert_same(snapshot(run.train(3, STEPS)), snapshot(other.train(3, STEPS)))


def test_lbfgs_whose_third_evaluation_raises_leaves_a_sparse_model():
    run = start(optimizer="lbfgs", schedule="constant")
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run.loop.gradients(0)

    with pytest.raises(KeyboardInterrupt):
        run.optimizer.step(closure)
    assert_exact(run)
    assert run.sparsifier.step_count == 0
    run.optimizer.state.clear()  # the state that LBFGS began is of no use to it
    run.train(1, 3)
    assert run.sparsifier.step_count == 2
    assert_exact(run)


def test_lbfgs_with_line_search():
    case = MODELS["mlp"]
    net = case.make()
    optimizer = torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe", max_iter=4)
    sparsifier = feather.sparsify(
        net, optimizer, sparsity=0.5, total_steps=TOTAL, schedule="constant"
    )
    run = Run(net, optimizer, sparsifier, Loop(net, net, optimizer, case), case)
    losses = [float(optimizer.step(lambda: run.loop.gradients(0))) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert_exact(run)


# --- steps that raise -----------------------------------------------------------------------


class Fragile(torch.optim.SGD):
    """Raises in the middle of a step on request."""

    error: type[BaseException] | None = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if i == 2 and self.error is not None:
                    raise self.error("in mid-step")
                p.sub_(p.grad, alpha=group["lr"])
        return loss


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_raises_leaves_a_sparse_model_that_can_be_trained(error, closure):
    run = attach(Fragile)
    run.train(0, 3)
    before = run.sparsifier.latent_weights()
    run.optimizer.error = error
    run.loop.gradients(3)
    with pytest.raises(error, match="in mid-step"):
        run.optimizer.step(lambda: run.loop.gradients(3)) if closure else run.optimizer.step()
    assert run.sparsifier.step_count == 3
    assert_exact(run)
    after = run.sparsifier.latent_weights()
    # Latent values of pruned weights are kept; weights that did not step are as before.
    assert all((w != 0).all() for w in after.values())
    assert torch.equal(after["2.weight"], before["2.weight"])
    run.optimizer.error = None
    run.train(3, TOTAL)
    assert run.sparsifier.step_count == TOTAL
    assert_exact(run)
    assert run.zeros() == 96


def test_a_checkpoint_after_a_step_that_raised_resumes():
    run = attach(Fragile).train(0, 3)
    run.optimizer.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run.loop.step(3)
    run.optimizer.error = None
    resumed = attach(Fragile).load(run.save())
    assert_same(snapshot(resumed.train(3, 6)), snapshot(run.train(3, 6)))


class FragileNested(Fragile):
    def step(self, closure=None):
        super().step(closure)
        return super().step(closure)


def test_an_inner_step_that_raises_unwinds_the_outer_one():
    run = attach(FragileNested).train(0, 2)
    run.optimizer.error = RuntimeError
    with pytest.raises(RuntimeError, match="in mid-step"):
        run.loop.step(2)
    assert_exact(run)
    assert run.sparsifier.step_count == 2
    run.optimizer.error = None
    run.train(2, 4)
    assert run.sparsifier.step_count == 4
    assert_exact(run)


@pytest.mark.parametrize("hook", ["pre", "post"])
def test_a_users_step_hook_that_raises_leaves_a_sparse_model(hook):
    run = start()

    def refuse(*_):
        raise RuntimeError("hook")

    register = getattr(run.optimizer, f"register_step_{hook}_hook")
    handle = register(refuse)
    with pytest.raises(RuntimeError, match="hook"):
        run.loop.step(0)
    assert_exact(run)
    assert all((w != 0).all() for w in run.sparsifier.latent_weights().values())
    handle.remove()
    steps = run.sparsifier.step_count
    run.train(1, 3)
    assert run.sparsifier.step_count == steps + 2
    assert_exact(run)


# --- steps that count -----------------------------------------------------------------------


def test_a_nested_step_counts_once():
    run = attach(NestedSGD, "convnet").train(0, 4)
    assert run.sparsifier.step_count == 4
    plain = attach(torch.optim.SGD, "convnet").train(0, 4)
    assert_same(run.sparsifier.latent_weights(), plain.sparsifier.latent_weights())


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw", *FUSED])
@pytest.mark.parametrize("recipe", ["scaler", "scaler + clip"])
def test_steps_that_a_grad_scaler_skips_do_not_count(optimizer, recipe):
    recipe = RECIPES[recipe]
    run = start("convnet", optimizer, recipe=recipe)
    count = 0
    for step in range(6):
        before = snapshot(run)["latent"]
        run.train(step, step + 1)
        count += step not in recipe.overflows
        assert run.sparsifier.step_count == count
        assert_exact(run)
        if step in recipe.overflows:
            assert_same(before, run.sparsifier.latent_weights())


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum", "adamw", "adamw-fused",
                                       "adamw-tensor-lr", "rmsprop", "adafactor"])  # fmt: skip
def test_the_phantom_step_that_makes_state_does_not_count(optimizer):
    """Checkpointing steps once with lr 0 and zero gradients, on an optimizer without state."""
    run, other = start(optimizer=optimizer), start(optimizer=optimizer)
    [optimizer] = run.optimizers
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        zero = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
        group["lr"] = zero
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    before = run.sparsifier.latent_weights()
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()
    assert run.sparsifier.step_count == 0
    assert_same(before, run.sparsifier.latent_weights())
    assert run.train(0, 3).sparsifier.step_count == 3
    assert run.zeros() == other.train(0, 3).zeros()


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum", "adamw", "adamw-fused"])
def test_a_real_first_step_with_lr_0_counts(optimizer):
    """Warm-up that starts at 0."""
    run = start(optimizer=optimizer)
    warm_up = LambdaLR(run.optimizer, lambda step: min(step / 3, 1.0))
    for step in range(3):
        run.train(step, step + 1)
        warm_up.step()
        assert run.sparsifier.step_count == step + 1


def test_the_schedule_stays_at_its_end_beyond_total_steps():
    run = start(total_steps=4).train(0, 4)
    end = run.sparsifier.latent_weights()
    assert run.zeros() == 96
    run.train(4, STEPS)
    assert run.sparsifier.step_count == STEPS
    assert run.zeros() == 96
    assert_exact(run)
    assert not torch.equal(end["0.weight"], run.sparsifier.latent_weights()["0.weight"])


def test_a_single_step_of_training():
    run = start(total_steps=1).train(0, 1)
    assert run.zeros() == 96
    assert_exact(run)


def test_a_sequence_advances_after_its_last_optimizer():
    run = start("attention", "muon+adamw", end=2)
    first, last = run.optimizers
    for step in range(3):
        zeros = run.zeros()
        run.loop.gradients(step)
        first.step()
        # Between the two the model is sparse, at the sparsity of the step under way.
        assert run.sparsifier.step_count == step
        assert run.zeros() == zeros
        assert_exact(run)
        last.step()
        assert run.sparsifier.step_count == step + 1
        assert_exact(run)
    assert run.zeros() == round(0.8 * run.case.size)


COMPLETING = ["spartan", "asl", "asl+", "feather-asl+", "str", "probmask"]


def split(method: str, scaler: torch.amp.GradScaler | None = None, fused: bool = False, **options):
    """A model of two optimizers, the scaled loss on it and the sparsifier's latent weights."""
    case = MODELS["mlp"]
    net = case.make()
    optimizers = [torch.optim.SGD(net[i].parameters(), 0.1, 0.9, fused=fused) for i in (0, 2)]
    if "asl" in method:
        options["dense_below"] = 0
    if method == "spartan":
        options |= {"end": 1, "beta": 50.0}
    settings = {"sparsity": 0.5, "total_steps": TOTAL} | options
    sparsifier = feather.sparsify(net, optimizers, method, **settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    return Run(net, optimizers, sparsifier, Loop(net, net, optimizers, case), case), scaler


def backward(run: Run, scaler: torch.amp.GradScaler, step: int) -> None:
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    x, y = run.case.batch(step)
    scaler.scale(F.cross_entropy(run.model(x), y)).backward()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", COMPLETING)
def test_a_grad_scaler_may_step_several_optimizers_one_after_another(method, fused):
    """The scale is a power of 2, so the results are bitwise identical."""
    first, second = (
        split(method, torch.amp.GradScaler("cpu", 1024.0, enabled=enabled), fused)
        for enabled in (True, False)
    )
    for step in range(6):
        for run, scaler in (first, second):
            backward(run, scaler, step)
            for optimizer in run.optimizers:
                scaler.step(optimizer)
            scaler.update()
    for a, b in zip(first[0].model.parameters(), second[0].model.parameters(), strict=True):
        assert torch.equal(a, b)
    pairs = zip(first[0].sparsifier.parameters(), second[0].sparsifier.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert_same(*(run.sparsifier.latent_weights() for run, _ in (first, second)))


@pytest.mark.parametrize("method", COMPLETING)
def test_a_grad_scaler_that_unscaled_one_of_two_fused_optimizers_is_an_error(method):
    run, scaler = split(method, torch.amp.GradScaler("cpu", 1024.0), fused=True)
    backward(run, scaler, 0)
    scaler.unscale_(run.optimizers[1])
    before = run.sparsifier.latent_weights()
    with pytest.raises(StateError, match=r"scaler\.unscale_ on every optimizer"):
        scaler.step(run.optimizers[0])
    assert_same(before, run.sparsifier.latent_weights())


@pytest.mark.parametrize("overflowing", [0, 1])
@pytest.mark.parametrize("method", COMPLETING)
def test_an_overflow_in_one_optimizer_does_no_harm_to_the_other(method, overflowing):
    """The scaler checks the gradients of each optimizer, and skips that one alone."""
    run, scaler = split(method, torch.amp.GradScaler("cpu", 1024.0))
    for step in range(3):
        backward(run, scaler, step)
        if step == 1:
            run.model[2 * overflowing].weight.grad[0, 0] = torch.inf
        for optimizer in run.optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert all(w.isfinite().all() for w in run.sparsifier.latent_weights().values())
    assert all(p.isfinite().all() for p in run.sparsifier.parameters())


@pytest.mark.parametrize("method", COMPLETING)
def test_gradients_are_completed_once_whatever_the_order_of_the_optimizers(method):
    gradients = []
    for order in (1, -1):
        run, scaler = split(method)
        backward(run, scaler, 0)
        for optimizer in run.optimizers[::order]:
            optimizer.step()
        gradients.append([p.grad for p in run.model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("method", COMPLETING)
def test_a_step_without_new_gradients_completes_nothing(method):
    run, scaler = split(method)
    for step in range(2):
        backward(run, scaler, step)
        for optimizer in run.optimizers:
            optimizer.step()
    before = [p.grad.clone() for p in run.model.parameters()]
    for optimizer in run.optimizers:
        optimizer.step()
    assert all(map(torch.equal, before, [p.grad for p in run.model.parameters()]))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("method", COMPLETING)
def test_gradients_assigned_by_hand_are_completed_too(method, in_place):
    (first, scaler), (second, _) = split(method), split(method)
    kept = {}
    for step in range(3):
        for run in (first, second):
            backward(run, scaler, step)
        for p in second.model.parameters():
            made = p.grad.clone()
            p.grad = kept[p].copy_(made) if in_place and step > 0 else made
        kept = {p: p.grad for p in second.model.parameters()}
        second.sparsifier.step.training.pending._reported = False  # autograd knows nothing of them
        for run in (first, second):
            for optimizer in run.optimizers:
                optimizer.step()
    assert_same(*(run.sparsifier.latent_weights() for run in (first, second)))
    pairs = zip(first.sparsifier.parameters(), second.sparsifier.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", ["asl", "asl+", "feather-asl+"])
def test_thresholds_do_not_change_without_a_backward_pass(method):
    run, _ = split(method)
    before = [p.clone() for p in run.sparsifier.parameters()]
    for _ in range(3):
        for optimizer in run.optimizers:
            optimizer.step()
    assert run.sparsifier.step_count == 3
    assert all(map(torch.equal, before, run.sparsifier.parameters()))


def test_a_parameter_without_a_gradient_keeps_its_latent_weight():
    run = start(schedule="constant")
    before = run.sparsifier.latent_weights()
    run.loop.gradients(0)
    run.model[2].weight.grad = None
    run.optimizer.step()
    after = run.sparsifier.latent_weights()
    assert torch.equal(before["2.weight"], after["2.weight"])
    assert not torch.equal(before["0.weight"], after["0.weight"])


# --- wrappers of a step ---------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_learning_rate_schedulers_may_come_before_or_after(when):
    """They replace `optimizer.step` on the instance, to notice whether it was called."""
    case = MODELS["mlp"]
    net = case.make()
    optimizer = OPTIMIZERS["sgd-momentum"](net)
    schedulers = []
    if when in ("before", "both"):
        schedulers.append(CosineAnnealingLR(optimizer, 20))
    sparsifier = feather.sparsify(net, optimizer, sparsity=0.8, total_steps=TOTAL)
    if when in ("after", "both"):
        schedulers.append(LambdaLR(optimizer, lambda step: 0.9**step))
    run = Run(net, optimizer, sparsifier, Loop(net, net, optimizer, case), case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            run.train(step, step + 1)
            for scheduler in schedulers:
                scheduler.step()
    assert sparsifier.step_count == 4
    assert_exact(run)
    # A step that raises is still noticed.
    calls = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(calls)
    assert_exact(run)
    assert sparsifier.step_count == 4


def test_users_hooks_see_gradients_of_the_latent_weights_and_the_sparse_model_after():
    run, seen = start(schedule="constant", theta=0.0), []
    pruned = ~run.sparsifier.masks()["0.weight"]

    def before(*_):
        seen.append(bool((run.model[0].weight.grad[pruned] == 0).all()))

    def after(*_):
        seen.append(run.zeros() == 96)

    run.optimizer.register_step_pre_hook(before)
    run.optimizer.register_step_post_hook(after)
    run.train(0, 1)
    assert seen == [True, True]


def test_the_pull_back_is_linear_in_repeated_and_partial_backward_passes():
    """Accumulation, `retain_graph` and `autograd.grad` all see dL/dw, scaled once."""
    run = start(schedule="constant", theta=0.25)
    weight, pruned = run.model[0].weight, ~run.sparsifier.masks()["0.weight"]
    loss = F.cross_entropy(run.model(run.case.batch(0)[0]), run.case.batch(0)[1])
    (direct,) = torch.autograd.grad(loss, weight, retain_graph=True)
    loss.backward(retain_graph=True)
    assert torch.equal(weight.grad, direct)
    loss.backward()
    assert torch.allclose(weight.grad, 2 * direct)
    net = MODELS["mlp"].make()
    with torch.no_grad():
        net.load_state_dict(run.model.state_dict())
    F.cross_entropy(net(run.case.batch(0)[0]), run.case.batch(0)[1]).backward()
    expected = torch.where(pruned, 0.25 * net[0].weight.grad, net[0].weight.grad)
    assert torch.allclose(direct, expected)


def test_plain_straight_through_hooks_no_gradient():
    """theta = 1 adds nothing to the backward pass."""
    assert not any(p._backward_hooks for p in start(theta=1.0).model.parameters())
    hooked = [bool(p._backward_hooks) for p in start(theta=0.5).model.parameters()]
    assert hooked == [True, False, True, False]


def test_inference_and_no_grad_evaluation_between_steps_change_nothing():
    run, other = start("convnet"), start("convnet")
    for step in range(4):
        run.train(step, step + 1)
        other.train(step, step + 1)
        run.model.eval()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                run.model(run.case.batch(99)[0])
                run.sparsifier.masks(), run.sparsifier.thresholds(), run.sparsifier.sparsity
        run.model.train()
    assert_same(snapshot(run), snapshot(other))


def test_a_step_inside_no_grad_or_inference_free_code_is_the_same_step():
    run, other = start(), start()
    run.loop.gradients(0)
    with torch.no_grad():
        run.optimizer.step()
    other.train(0, 1)
    assert_same(snapshot(run), snapshot(other))
    assert all(p.requires_grad and p.is_leaf for p in run.model.parameters())
    assert as_list(run.optimizer)

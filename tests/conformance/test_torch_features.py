"""Features of PyTorch: steps in backward, recomputed activations, torch.compile."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers
from torch.utils.checkpoint import checkpoint

import torch_feather as feather

from .harness import STEPS, TOTAL, Loop, Run, assert_same, snapshot, start
from .methods import METHODS, resolved
from .models import CLASSES, MODELS, ModelCase

# Methods whose gradients need no completion.
ELEMENTWISE = [
    "feather", "feather-theta", "hard-ste", "gmp-stem", "feather-erk", "feather-flops",
    "feather-ham", "st3-sigma",
]  # fmt: skip
OTHERS = ["probmask", "spartan", "asl", "asl+", "str"]

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}  # as "sgd-momentum" of the suite


# --- optimizers that step within the backward pass ------------------------------------------


def by_hand(model: nn.Module) -> list[torch.optim.Optimizer]:
    """An optimizer for each parameter, stepped by a hook as soon as its gradient is complete."""
    optimizers = {p: torch.optim.SGD([p], **SGD) for p in model.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return list(optimizers.values())


def by_torch(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The same by PyTorch's own function."""
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), SGD)
    return _get_in_backward_optimizers(model)


FORMS = {"hooks": by_hand, "_apply_optimizer_in_backward": by_torch}


class InBackward(Loop):
    """A loop whose optimizers have stepped when the backward pass is over."""

    def step(self, step: int) -> bool:
        x, y = self.case.batch(step, self.dtype)
        F.cross_entropy(self.forward(x), y).backward()
        return True


def in_backward(model: str = "mlp", form=by_hand, method: str = "feather", **settings) -> Run:
    case, chosen = MODELS[model], METHODS[method]
    net = case.make()
    optimizers = form(net)
    settings = {"sparsity": chosen.sparsity, **resolved(chosen.options, case), **settings}
    sparsifier = feather.sparsify(net, optimizers, chosen.method, total_steps=TOTAL, **settings)
    return Run(net, optimizers, sparsifier, InBackward(net, net, optimizers, case), case)


def after_it(model: str = "mlp", method: str = "feather", **settings) -> Run:
    """The plain loop with one optimizer."""
    chosen = METHODS[method]
    settings = {"sparsity": chosen.sparsity, **chosen.options, **settings}
    return start(model, method=chosen.method, **settings)


def seen(run: Run) -> dict[str, object]:
    return {
        "parameters": [p.detach().clone() for p in run.model.parameters()],
        "latent": run.sparsifier.latent_weights(),
        "thresholds": run.sparsifier.thresholds(),
        "learned": [p.clone() for p in run.sparsifier.parameters()],
        "steps": run.sparsifier.step_count,
    }


@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("model", ["mlp", "convnet", "attention", "tied"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_steps_in_backward_equal_the_plain_loop(form, model, method):
    run, plain = in_backward(model, form, method), after_it(model, method)
    for number in range(TOTAL + 2):
        run.train(number, number + 1)
        plain.train(number, number + 1)
        assert_same(seen(run), seen(plain))


def test_within_the_backward_pass_the_model_is_that_of_the_forward_pass():
    """Later layers and recomputed ones read it."""
    run = in_backward("convnet", schedule="constant")
    held = []
    for p in run.model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: held.append(run.case.zeros(run.model)))
    before = [p.detach().clone() for p in run.case.weights(run.model).values()]
    values = lambda: [p.detach().clone() for p in run.case.weights(run.model).values()]  # noqa: E731
    run.model.head.weight.register_post_accumulate_grad_hook(lambda _: held.append(values()))
    run.train(0, 1)
    (at_head,) = [entry for entry in held if isinstance(entry, list)]
    assert_same(at_head, before)
    assert {entry for entry in held if isinstance(entry, int)} == {round(0.8 * run.case.size)}


@pytest.mark.parametrize("order", ["model first", "optimizers first"])
def test_a_run_that_steps_in_backward_resumes_exactly(order):
    whole = in_backward("convnet", method="feather-theta").train(0, STEPS)
    saved = in_backward("convnet", method="feather-theta").train(0, 4).save()
    resumed = in_backward("convnet", method="feather-theta").load(saved, order)
    assert_same(seen(resumed.train(4, STEPS)), seen(whole))


def test_some_weights_may_step_in_backward_and_the_rest_after_it():
    plain = after_it().train(0, STEPS)
    net = MODELS["mlp"].make()
    first, *others = net.parameters()
    early, late = torch.optim.SGD([first], **SGD), torch.optim.SGD(others, **SGD)
    first.register_post_accumulate_grad_hook(lambda _: early.step())
    sparsifier = feather.sparsify(net, [late, early], sparsity=0.8, total_steps=TOTAL)
    for number in range(STEPS):
        net.zero_grad()
        x, y = MODELS["mlp"].batch(number)
        F.cross_entropy(net(x), y).backward()
        late.step()
    run = Run(net, [late, early], sparsifier, None, MODELS["mlp"])
    assert_same(seen(run), seen(plain))


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_methods_that_need_all_gradients_raise_in_backward(form, method):
    run = in_backward("mlp", form, method)
    with pytest.raises(feather.StateError, match="inside it, and the method needs the gradients"):
        run.train(0, 1)
    assert run.sparsifier.step_count == 0


@pytest.mark.gpu
def test_steps_in_backward_on_a_gpu_are_those_of_the_plain_loop():
    """On a GPU other threads run the backward pass."""
    runs = []
    for form in (by_hand, lambda net: [torch.optim.SGD(net.parameters(), **SGD)]):
        net = MODELS["convnet"].make().cuda()
        optimizers = form(net)
        sparsifier = feather.sparsify(net, optimizers, sparsity=0.8, total_steps=TOTAL, theta=0.5)
        for number in range(STEPS):
            x, y = (t.cuda() for t in MODELS["convnet"].batch(number))
            F.cross_entropy(net(x), y).backward()
            if form is not by_hand:
                optimizers[0].step()
                optimizers[0].zero_grad()
        assert sparsifier.step_count == STEPS
        runs.append(net)
    for p, q in zip(*(net.parameters() for net in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert len({MODELS["convnet"].zeros(net) for net in runs}) == 1


class Spare(nn.Module):
    """A layer of it is left out of the forward pass now and then."""

    def __init__(self):
        super().__init__()
        self.body, self.spare, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.left_out = False

    def forward(self, x):
        x = torch.relu(self.body(x))
        return self.head(x if self.left_out else torch.relu(self.spare(x)))


def spare(**settings) -> tuple[Run, Run]:
    """A model that steps in backward, with one that does not; two steps are taken."""
    case = ModelCase("spare", Spare, {"body.weight": 36, "spare.weight": 36, "head.weight": 24},
                     MODELS["mlp"].inputs)  # fmt: skip
    runs = []
    for form in (by_hand, lambda net: [torch.optim.SGD(net.parameters(), **SGD)]):
        net = case.make()
        optimizers = form(net)
        sparsifier = feather.sparsify(net, optimizers, sparsity=0.5, total_steps=TOTAL, **settings)
        kind = InBackward if form is by_hand else Loop
        run = Run(net, optimizers, sparsifier, kind(net, net, optimizers, case), case)
        runs.append(run.train(0, 2))
    return runs[0], runs[1]


READS = {
    "the next step": lambda run: run.train(3, 4),
    "save": lambda run: run.save(),
    "sparsity": lambda run: run.sparsifier.sparsity,
    "finalize": lambda run: run.sparsifier.finalize(force=True),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_weight_without_a_gradient_is_an_error_and_never_half_a_step(read):
    run, _ = spare()
    before = run.case.zeros(run.model)
    run.model.left_out = True
    run.train(2, 3)
    assert run.case.zeros(run.model) == before  # still the model of the last whole step
    with pytest.raises(feather.StateError, match=r"the optimizers of spare\.weight did not\."):
        read(run)
    assert run.sparsifier.step_count == 2
    run.model.left_out = False
    run.model.zero_grad()
    run.train(4, TOTAL + 2)  # and training continues
    assert run.sparsifier.step_count == TOTAL
    assert run.case.zeros(run.sparsifier.finalize()) == round(0.5 * 96)


READS_WITHIN = {
    "save": lambda run: run.optimizers[0].state_dict(),
    "sparsity": lambda run: run.sparsifier.sparsity,
}


@pytest.mark.parametrize("read", READS_WITHIN.values(), ids=READS_WITHIN)
def test_half_a_step_cannot_be_saved_or_read_within_the_backward_pass(read):
    run = in_backward("convnet").train(0, 2)
    run.model.head.weight.register_post_accumulate_grad_hook(lambda _: read(run))
    with pytest.raises(feather.StateError, match="after the backward pass"):
        run.train(2, 3)


def test_a_weight_without_a_gradient_may_be_excluded():
    run, plain = spare(exclude="spare.weight")
    for one in (run, plain):
        one.model.left_out = True
        one.train(2, STEPS)
    assert_same(seen(run), seen(plain))


def test_loading_ends_a_step_that_was_half_done():
    run, whole = spare()
    saved = run.save()
    run.model.left_out = True
    run.train(2, 3)
    run.model.left_out = False
    assert_same(seen(run.load(saved).train(3, STEPS)), seen(whole.train(3, STEPS)))


class Fragile(torch.optim.SGD):
    """Fails in the middle of a step on request."""

    fails = False

    def step(self, closure=None):
        super().step(closure)
        if self.fails:
            raise torch.OutOfMemoryError("in mid-step")


def test_a_step_in_backward_that_raises_leaves_a_sparse_model_that_can_be_trained(monkeypatch):
    monkeypatch.setattr(torch.optim, "SGD", Fragile)
    run = in_backward("convnet", schedule="constant").train(0, 3)
    fragile = run.optimizers[4]
    fragile.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        run.train(3, 4)
    fragile.fails = False
    run.model.zero_grad()
    expected = round(0.8 * run.case.size)
    assert run.case.zeros(run.model) == expected
    assert run.sparsifier.step_count == 3
    assert run.train(4, STEPS).case.zeros(run.model) == expected
    assert run.sparsifier.step_count == STEPS - 1


def test_a_scaler_in_backward_is_an_error():
    run = in_backward()
    run.optimizers[2].found_inf = torch.tensor(0.0)  # as GradScaler sets on fused optimizers
    with pytest.raises(feather.StateError, match="nor GradScaler"):
        run.train(0, 1)


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_that_ddp_has_not_averaged_are_an_error(form, process_group):
    """In the backward pass they are those of one rank, and the masks would drift apart."""
    net = MODELS["mlp"].make()
    optimizers = form(net)
    model = nn.parallel.DistributedDataParallel(net)

    def train():
        feather.sparsify(model, optimizers, sparsity=0.8, total_steps=TOTAL)
        x, y = MODELS["mlp"].batch(0)
        F.cross_entropy(model(x), y).backward()

    with pytest.raises(feather.FeatherError, match=r"DistributedDataParallel .* averag"):
        train()


def test_zeros_are_kept_by_steps_in_backward():
    run = in_backward("convnet").train(0, TOTAL)
    run.sparsifier.finalize(keep_masks=True)
    mask = [p == 0 for p in run.case.weights(run.model).values()]
    run.train(TOTAL, TOTAL + 3)
    assert_same([p == 0 for p in run.case.weights(run.model).values()], mask)


# --- activation checkpointing ---------------------------------------------------------------


class Blocks(nn.Module):
    """Blocks with dropout, of which the activations can be dropped and recomputed."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 6))
            for _ in range(3)
        )
        self.head = nn.Linear(6, CLASSES)
        self.reentrant: bool | None = None  # None: nothing is recomputed
        self.calls = 0

    def call(self, block, x):
        self.calls += 1
        return x + block(x)

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = self.call(block, x)
            else:
                x = checkpoint(self.call, block, x, use_reentrant=self.reentrant)
        return self.head(x)


BLOCKS = ModelCase(
    "blocks", Blocks, {f"blocks.{i}.{j}.weight": 72 for i in range(3) for j in (0, 3)}
    | {"head.weight": 24}, MODELS["mlp"].inputs,
)  # fmt: skip


def train_blocks(method: str, reentrant: bool | None, form=None) -> Run:
    chosen = METHODS[method]
    net = BLOCKS.make()
    net.reentrant = reentrant
    optimizers = [torch.optim.SGD(net.parameters(), **SGD)] if form is None else form(net)
    sparsifier = feather.sparsify(
        net, optimizers, chosen.method, sparsity=chosen.sparsity, total_steps=TOTAL,
        **resolved(chosen.options, BLOCKS),
    )  # fmt: skip
    torch.manual_seed(1)  # of the dropout
    for number in range(STEPS):
        for optimizer in optimizers if form is None else []:
            optimizer.zero_grad()
        x, y = BLOCKS.batch(number)
        for fraction in sparsifier.passes():
            (fraction * F.cross_entropy(net(x.requires_grad_()), y)).backward()
        for optimizer in optimizers if form is None else []:
            optimizer.step()
    assert net.calls == STEPS * sparsifier.step.training.method.facts.passes * 3 * (
        1 + (reentrant is not None)
    )
    return Run(net, optimizers, sparsifier, None, BLOCKS)


@pytest.mark.parametrize("method", [*ELEMENTWISE, *OTHERS, "feather-asl+"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_are_those_of_the_same_effective_weights(reentrant, method):
    assert_same(seen(train_blocks(method, reentrant)), seen(train_blocks(method, None)))


def test_a_recomputed_pass_has_the_random_mask_of_its_pass(monkeypatch):
    two = METHODS["probmask"]
    monkeypatch.setitem(METHODS, "two", replace(two, options={"passes": 2}))
    assert_same(seen(train_blocks("two", False)), seen(train_blocks("two", None)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_recomputing_and_stepping_in_backward_go_together(form, reentrant):
    run, plain = train_blocks("feather-theta", reentrant, form), train_blocks("feather-theta", None)
    assert_same(seen(run), seen(plain))


# --- torch.compile --------------------------------------------------------------------------


def compiled_forward(model: nn.Module, **how):
    """Forward pass and loss as one compiled function."""
    torch._dynamo.reset()
    return torch.compile(lambda x, y: F.cross_entropy(model(x), y), fullgraph=True, **how)


def compare_compiled(method: str, model: str = "convnet", where: str = "cpu", **how) -> None:
    """A compiled loop takes the steps of the plain one, to rounding."""
    case, chosen = MODELS[model], METHODS[method]
    runs = []
    for compiled in (True, False):
        net = case.make().to(where)
        optimizer = torch.optim.SGD(net.parameters(), **SGD)
        sparsifier = feather.sparsify(
            net, optimizer, chosen.method, sparsity=chosen.sparsity, total_steps=TOTAL,
            **resolved(chosen.options, case),
        )  # fmt: skip
        loss = (
            compiled_forward(net, **how)
            if compiled
            else lambda x, y, net=net: F.cross_entropy(net(x), y)
        )
        for number in range(STEPS):
            x, y = (t.to(where) for t in case.batch(number))
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
        runs.append((net, sparsifier, case.zeros(net)))
    (net, sparsifier, zeros), (other, plain, same_zeros) = runs
    assert zeros == same_zeros
    assert sparsifier.step_count == plain.step_count == STEPS
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_forward_and_loss_compile_to_one_graph_that_stays():
    counter = CompileCounterWithBackend("aot_eager")
    compare_compiled("feather-theta", "mlp", backend=counter)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_reduce_overhead_takes_the_plain_steps_on_a_cpu():
    """There it has no graphs to capture, and is what the default mode is."""
    compare_compiled("feather-theta", mode="reduce-overhead")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["feather-theta", "spartan", "probmask", "st3"])
def test_reduce_overhead_takes_the_plain_steps_on_a_gpu(method):
    """Its CUDA graphs read the memory of the parameters, which are written in place."""
    compare_compiled(method, where="cuda", mode="reduce-overhead")


@pytest.mark.slow
def test_a_step_that_is_compiled_whole_takes_the_plain_steps():
    """Forward, backward and optimizer in one function: PyTorch breaks the graph between them."""
    torch._dynamo.reset()
    run, plain = start("mlp", theta=0.5), start("mlp", theta=0.5).train(0, 4)

    @torch.compile(backend="aot_eager")
    def step(x, y):
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()

    with warnings.catch_warnings(action="ignore"):
        for number in range(4):
            step(*run.case.batch(number))
    for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert run.zeros() == plain.zeros()
    assert run.sparsifier.step_count == 4


def test_an_optimizer_step_compiled_with_fullgraph_is_an_error_with_a_remedy():
    """PyTorch does not support it for any optimizer, and the message must say so."""
    torch._dynamo.reset()
    run = start("mlp").train(0, 1)
    before = snapshot(run)
    step = torch.compile(run.optimizer.step, backend="eager", fullgraph=True)
    run.loop.gradients(1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the optimizer's step without it"):
        step()
    assert_same(snapshot(run), before)

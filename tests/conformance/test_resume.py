"""A killed run resumes bitwise from model.state_dict() and optimizer.state_dict() alone."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import torch_feather as feather
from torch_feather.engine.checkpoint import FORMAT, Header
from torch_feather.errors import StateError

from .harness import (
    RECIPES,
    STEPS,
    TOTAL,
    Loop,
    Run,
    assert_same,
    read,
    snapshot,
    start,
    unchanged,
)
from .methods import METHODS
from .models import MODELS
from .optimizers import OPTIMIZERS, as_list


def uninterrupted(**settings) -> tuple[list[bytes], dict[str, object]]:
    """Checkpoints before every step, and the final state."""
    run, checkpoints = start(**settings), []
    for step in range(STEPS):
        checkpoints.append(run.save())
        run.train(step, step + 1)
    return checkpoints, snapshot(run)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes_bitwise_from_any_step(optimizer):
    checkpoints, end = uninterrupted(model="convnet", optimizer=optimizer, theta=0.5)
    for killed, checkpoint in enumerate(checkpoints):
        # Another seed: nothing of the fresh model may survive.
        run = start("convnet", optimizer, seed=1 + killed, theta=0.5)
        order = ["model first", "optimizer first"][killed % 2]
        run.load(checkpoint, order).train(killed, STEPS)
        assert_same(snapshot(run), end)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_bitwise(method):
    case = METHODS[method]
    settings = {"method": case.method, "sparsity": case.sparsity, **case.options}
    checkpoints, end = uninterrupted(**settings)
    run = start(seed=1, **settings).load(checkpoints[4]).train(4, STEPS)
    assert_same(snapshot(run), end)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("model", ["mlp", "attention"])
def test_every_dtype_resumes_bitwise(model, dtype):
    checkpoints, end = uninterrupted(model=model, dtype=dtype, total_steps=1_000_003, end=5)
    run = start(model, dtype=dtype, seed=1, total_steps=1_000_003, end=5)
    assert_same(snapshot(run.load(checkpoints[3]).train(3, STEPS)), end)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_resumes_bitwise(model):
    checkpoints, end = uninterrupted(model=model)
    run = start(model, seed=1).load(checkpoints[5], "optimizer first").train(5, STEPS)
    assert_same(snapshot(run), end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum", "adamw", "adafactor", "muon+adamw"])
def test_sparsify_after_loading_resumes_bitwise(optimizer, dtype):
    """A loop that restores first and calls sparsify later finds all in the optimizer's state.

    torch casts every loaded entry to the type of its parameter.
    """
    settings = {"optimizer": optimizer, "dtype": dtype, "total_steps": 30_011, "end": 5}
    checkpoints, end = uninterrupted(**settings)
    # Not from before the first step: torch's Adam refuses a parameter's state without its own.
    for killed in (1, 5):
        case, state = MODELS["mlp"], read(checkpoints[killed])
        net = case.make(7, dtype)
        made = OPTIMIZERS[optimizer](net)
        net.load_state_dict(state["model"])
        for one, saved in zip(as_list(made), state["optimizers"], strict=True):
            one.load_state_dict(saved)
        sparsifier = feather.sparsify(
            net, made, sparsity=0.8, total_steps=settings["total_steps"], end=5
        )
        run = Run(net, made, sparsifier, Loop(net, net, made, case, dtype=dtype), case)
        assert_same(snapshot(run.train(killed, STEPS)), end)


def test_a_run_interrupted_twice_resumes_bitwise():
    checkpoints, end = uninterrupted()
    run = start(seed=1).load(checkpoints[2]).train(2, 5)
    run = start(seed=2).load(run.save()).train(5, STEPS)
    assert_same(snapshot(run), end)


def test_loading_into_a_run_that_has_trained_rewinds_it():
    checkpoints, end = uninterrupted()
    run = start().train(0, 7).load(checkpoints[3]).train(3, STEPS)
    assert_same(snapshot(run), end)


def test_saving_changes_nothing():
    run, other = start(), start()
    for step in range(STEPS):
        run.save()
        run.train(step, step + 1)
        other.train(step, step + 1)
    assert_same(snapshot(run), snapshot(other))


def test_the_saved_model_is_sparse_and_the_optimizer_holds_the_latents():
    run = start("convnet").train(0, STEPS)
    state = read(run.save())
    sparse = sum(int((state["model"][name] == 0).sum()) for name in run.case.prunable)
    assert sparse == round(0.8 * run.case.size)
    saved = state["optimizers"][0]["state"]
    names = [name for name, _ in run.model.named_parameters()]
    for name, latent in run.sparsifier.latent_weights().items():
        assert torch.equal(saved[names.index(name)]["feather_latent"], latent)
    assert set(state["optimizers"][0]) == {"state", "param_groups"}


@pytest.mark.parametrize(
    "optimizer",
    ["sgd", "sgd-momentum", "adamw", "lbfgs", "muon+adamw", "lion (pytorch_optimizer)"],
)
def test_the_live_optimizer_state_has_no_entries_of_the_sparsifier(optimizer):
    def check(run):
        for one in run.optimizers:
            entries = [key for state in one.state.values() for key in state]
            groups = [key for group in one.param_groups for key in group]
            assert not [key for key in entries + groups if "feather" in str(key)]

    run = start(optimizer=optimizer)
    check(run)
    check(run.train(0, 3))
    run.save()
    check(run)
    check(start(optimizer=optimizer).load(run.save()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon+adamw"])
def test_the_users_state_is_not_changed_by_loading_it(optimizer):
    state = read(start(optimizer=optimizer).train(0, 3).save())
    before = copy.deepcopy(state)
    run = start(optimizer=optimizer)
    for one, saved in zip(run.optimizers, state["optimizers"], strict=True):
        one.load_state_dict(saved)
    assert_same(state, before)
    # The optimizer continues with the given tensors, as torch does; the sparsifier copies its own.
    run.train(3, STEPS)
    for saved, old in zip(state["optimizers"], before["optimizers"], strict=True):
        for key, entries in old["state"].items():
            for name in entries:
                if "feather" in name:
                    assert torch.equal(saved["state"][key][name], entries[name])


def test_a_state_taken_in_memory_does_not_follow_the_latents():
    """`state_dict()` then more steps then `load_state_dict()`: an early-stopping loop's rewind."""
    run = start().train(0, 3)
    model, optimizer = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    latent = {n: w.clone() for n, w in run.sparsifier.latent_weights().items()}
    run.train(3, 6)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    assert_same(run.sparsifier.latent_weights(), latent)
    assert run.sparsifier.step_count == 3


# --- states that do not belong --------------------------------------------------------------


def of_another_shape() -> Run:
    """As many parameters, of other sizes."""
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    sparsifier = feather.sparsify(net, optimizer, sparsity=0.8, total_steps=TOTAL)
    return Run(net, optimizer, sparsifier, Loop(net, net, optimizer, MODELS["mlp"]), MODELS["mlp"])


def dense() -> bytes:
    net = MODELS["mlp"].make()
    optimizer = OPTIMIZERS["sgd-momentum"](net)
    loop = Loop(net, net, optimizer, MODELS["mlp"])
    loop.step(0)
    file = Run(net, optimizer, None, loop, MODELS["mlp"])
    return file.save()


FOREIGN = {
    "a dense run": (dense, r"latent"),
    "another shape": (lambda: of_another_shape().train(0, 2).save(), r"weight"),
    "another method": (lambda: start(method="hard-ste").train(0, 2).save(), r"hard-ste|method"),
    "another p": (lambda: start(p=2.0).train(0, 2).save(), r"option"),
    "another theta": (lambda: start(theta=0.25).train(0, 2).save(), r"theta|option"),
    "another sparsity": (lambda: start(sparsity=0.7).train(0, 2).save(), r"sparsity"),
    "other total_steps": (lambda: start(total_steps=50).train(0, 2).save(), r"total_steps"),
    "another schedule": (lambda: start(schedule="linear").train(0, 2).save(), r"schedule|option"),
    "other bounds": (lambda: start(end=9).train(0, 2).save(), r"schedule|option"),
    "other exclusions": (
        lambda: start(exclude="2.*").train(0, 2).save(),
        r"2\.weight|prunable|model",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_unfit_state_is_an_error_and_changes_nothing(kind):
    make, names_the_difference = FOREIGN[kind]
    state = read(make())["optimizers"][0]
    run = start().train(0, 4)
    with (
        unchanged(run),
        pytest.raises((StateError, ValueError), match=names_the_difference),
    ):
        run.optimizer.load_state_dict(state)
    other = start().train(0, 4)
    assert_same(snapshot(run.train(4, 6)), snapshot(other.train(4, 6)))


def test_a_state_that_torch_rejects_leaves_the_run_unchanged():
    """Its latent weights are fine, its parameter groups are not."""
    state = read(start(seed=1).train(0, 2).save())["optimizers"][0]
    state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))
    run = start().train(0, 4)
    with unchanged(run), pytest.raises((StateError, ValueError)):
        run.optimizer.load_state_dict(state)
    other = start().train(0, 4)
    assert_same(snapshot(run.train(4, 6)), snapshot(other.train(4, 6)))


def test_a_state_with_one_latent_missing_or_misshapen_is_an_error():
    good = read(start(seed=1).train(0, 2).save())["optimizers"][0]
    missing, misshapen = copy.deepcopy(good), copy.deepcopy(good)
    del missing["state"][2]["feather_latent"]
    misshapen["state"][2]["feather_latent"] = torch.zeros(5)
    for state in (missing, misshapen):
        run = start()
        with unchanged(run), pytest.raises((StateError, ValueError), match=r"2\.weight"):
            run.optimizer.load_state_dict(state)


def test_an_unfit_state_of_one_of_two_optimizers_is_an_error():
    foreign = read(start(optimizer="muon+adamw", sparsity=0.7).train(0, 2).save())["optimizers"]
    run = start(optimizer="muon+adamw").train(0, 3)
    with unchanged(run), pytest.raises((StateError, ValueError), match="sparsity"):
        run.optimizers[0].load_state_dict(foreign[0])


# --- the deliberate override ----------------------------------------------------------------


def test_relaxed_loading_loads_latents_and_step_into_other_settings():
    source = start().train(0, 4)
    checkpoint = source.save()
    latent, step = source.sparsifier.latent_weights(), source.sparsifier.step_count
    run = start(seed=1, method="hard-ste", sparsity=0.9, total_steps=40)
    with run.sparsifier.relaxed_loading():
        run.load(checkpoint)
    assert run.sparsifier.step_count == step
    assert run.sparsifier.target == 0.9
    assert run.sparsifier.total_steps == 40
    assert_same(run.sparsifier.latent_weights(), latent)
    assert run.zeros() == round(run.sparsifier.sparsity * run.case.size)


def test_relaxed_loading_starts_from_a_dense_run():
    """Its weights become the latent ones, and its momentum is kept."""
    checkpoint = dense()
    state = read(checkpoint)
    run = start(seed=1)
    with run.sparsifier.relaxed_loading():
        run.load(checkpoint)
    assert run.sparsifier.step_count == 0
    for name, latent in run.sparsifier.latent_weights().items():
        assert torch.equal(latent, state["model"][name])
    assert_same(run.optimizer.state_dict()["state"][0]["momentum_buffer"],
                state["optimizers"][0]["state"][0]["momentum_buffer"])  # fmt: skip
    run.train(0, STEPS)
    assert run.zeros() == 96


def test_relaxed_loading_ends_with_its_block():
    foreign = read(start(sparsity=0.7).train(0, 2).save())["optimizers"][0]
    run = start()
    with run.sparsifier.relaxed_loading():
        pass
    with pytest.raises(StateError):
        run.optimizer.load_state_dict(foreign)
    with pytest.raises(KeyError), run.sparsifier.relaxed_loading():
        raise KeyError
    with pytest.raises(StateError):
        run.optimizer.load_state_dict(foreign)


def test_relaxed_loading_restarts_missing_latents_from_the_parameters():
    state = read(start(seed=1, optimizer="sgd").train(0, 4).save())["optimizers"][0]
    state["state"][2]["feather_latent"] = torch.zeros(5)
    run = start(optimizer="sgd")
    effective = run.model[2].weight.detach().clone()
    with run.sparsifier.relaxed_loading():
        run.optimizer.load_state_dict(state)
    latent = run.sparsifier.latent_weights()
    assert torch.equal(latent["0.weight"], state["state"][0]["feather_latent"])
    assert torch.equal(latent["2.weight"], effective)
    assert run.sparsifier.step_count == 4
    assert run.zeros() == round(run.sparsifier.sparsity * 120)


def with_step(header, step):
    return Header.read(header)._replace(step=step).tensor()


DAMAGED = {  # entries that are no such tensor, as of an edited or damaged checkpoint
    "a list": lambda value: [0.5],
    "a number": lambda value: 3,
    "no values": lambda value: value.to("meta"),
    "sparse": lambda value: value.to_sparse(),
    "complex": lambda value: value.to(torch.complex64),
    "not a number": lambda value: torch.full(value.shape, torch.nan),
    "no bytes": lambda value: value.double() + 0.5,
    "cut": lambda value: value.reshape(-1)[:-1],
}


@pytest.mark.parametrize("door", ["optimizer", "relaxed", "sparsifier"])
@pytest.mark.parametrize("entry", ["latent", "header", "zeros"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_entry_is_an_error_and_changes_nothing(kind, entry, door):
    if entry == "latent" and kind in ("not a number", "no bytes"):
        pytest.skip("any number may be a latent weight")
    if door == "relaxed" and (entry == "zeros" or (entry, kind) == ("latent", "cut")):
        pytest.skip("it is left out")
    saved = start(seed=1).train(0, 2)
    run = start().train(0, 4)
    if door == "sparsifier":
        state = saved.sparsifier.state_dict()
        load, own, prefix = run.sparsifier.load_state_dict, state["2.weight"], ""
    else:
        state = read(saved.save())["optimizers"][0]
        load, own, prefix = run.optimizer.load_state_dict, state["state"][2], "feather_"
    own[prefix + entry] = DAMAGED[kind](own[prefix + entry])
    relaxed = run.sparsifier.relaxed_loading() if door == "relaxed" else nullcontext()
    with unchanged(run), relaxed, pytest.raises(StateError, match=r"2\.weight"):
        load(state)


@pytest.mark.parametrize("step", [-1, -(2**62), 2**53 + 1])
def test_an_impossible_step_is_an_error(step):
    state = start().train(0, 2).sparsifier.state_dict()
    for own in state.values():
        own["header"] = with_step(own["header"], step)
    run = start().train(0, 3)
    with unchanged(run), pytest.raises(StateError, match=r"header for .* is damaged"):
        run.sparsifier.load_state_dict(state)


def test_any_changed_byte_of_a_header_is_an_error():
    """As of a damaged disk; a changed count of steps would be trained from otherwise."""
    state = start().train(0, 2).sparsifier.state_dict()
    right = state["2.weight"]["header"]
    run = start().train(0, 3)
    for position in range(len(right)):
        state["2.weight"]["header"] = right.clone()
        state["2.weight"]["header"][position] ^= 0x81
        with unchanged(run), pytest.raises(StateError, match=r"header for 2\.weight is damaged"):
            run.sparsifier.load_state_dict(state)


def test_a_header_of_version_0_1_has_no_checksum_and_is_read():
    header = Header(FORMAT, 3, 10, 5, -6, 7, 8)
    words = b"".join(value.to_bytes(8, "little", signed=True) for value in header)
    old = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    assert Header.read(old) == header
    assert not torch.equal(header.tensor(), old)
    assert Header.read(header.tensor().half()) == header  # as optimizers cast loaded states


def test_weights_of_different_steps_are_an_error():
    """The step would be that of the last weight, and the thresholds of the others another one's."""
    state = start().train(0, 2).sparsifier.state_dict()
    state["2.weight"]["header"] = with_step(state["2.weight"]["header"], 3)
    run = start().train(0, 3)
    with unchanged(run), pytest.raises(StateError, match=r"not of the same step.*2\.weight at 3"):
        run.sparsifier.load_state_dict(state)


@pytest.mark.parametrize("state", [None, [], {"0.weight": 3.0}, {1: {}}, {"\x1b[2J": {}}])
def test_what_is_no_state_of_a_sparsifier_is_an_error(state):
    run = start().train(0, 3)
    with unchanged(run), pytest.raises(StateError) as caught:
        run.sparsifier.load_state_dict(state)
    assert str(caught.value).isprintable()


# --- other roads ----------------------------------------------------------------------------


def test_the_state_of_the_sparsifier_round_trips():
    run = start("convnet").train(0, 4)
    file = io.BytesIO()
    torch.save(run.sparsifier.state_dict(), file)
    file.seek(0)
    other = start("convnet", seed=1)
    other.sparsifier.load_state_dict(torch.load(file, weights_only=True))
    assert_same(other.sparsifier.latent_weights(), run.sparsifier.latent_weights())
    assert_same(other.sparsifier.masks(), run.sparsifier.masks())
    assert other.sparsifier.step_count == 4
    assert other.zeros() == run.zeros()


@pytest.mark.parametrize("kind", ["another sparsity", "another method", "other total_steps"])
def test_an_unfit_state_of_the_sparsifier_is_an_error(kind):
    settings = {
        "another sparsity": {"sparsity": 0.7},
        "another method": {"method": "soft-ste"},
        "other total_steps": {"total_steps": 77},
    }[kind]
    state = start(**settings).train(0, 2).sparsifier.state_dict()
    run = start().train(0, 3)
    with unchanged(run), pytest.raises(StateError, match=FOREIGN[kind][1]):
        run.sparsifier.load_state_dict(state)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum", "adamw", "adafactor"])
def test_resume_through_torch_distributed_checkpoint(optimizer):
    """Its state names parameters, and it steps once with lr 0 and no gradients to make state."""
    whole = start(optimizer=optimizer).train(0, STEPS)
    run = start(optimizer=optimizer).train(0, 4)
    model = copy.deepcopy(run.model.state_dict())
    run.optimizer.zero_grad()
    state = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer))
    assert run.sparsifier.step_count == 4
    resumed = start(optimizer=optimizer, seed=1)
    resumed.model.load_state_dict(model)
    set_optimizer_state_dict(resumed.model, resumed.optimizer, state)
    assert resumed.sparsifier.step_count == 4
    resumed.train(4, STEPS)
    for actual, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert_same(resumed.sparsifier.latent_weights(), whole.sparsifier.latent_weights())


def test_a_flattened_distributed_state_is_an_error():
    """torch rebuilds it with the keys of the live state alone, which drops the latent weights."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    run = start(optimizer="adamw").train(0, 4)
    state = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=options))
    assert "state.0.weight.feather_latent" in state
    resumed = start(optimizer="adamw", seed=1)
    with pytest.raises(StateError, match="latent"):
        set_optimizer_state_dict(resumed.model, resumed.optimizer, state, options=options)


def test_a_layer_frozen_during_training_keeps_its_latent_weights_in_checkpoints():
    def freeze(run):
        run.model[0].weight.requires_grad_(False)
        return run

    whole = freeze(start().train(0, 4)).train(4, STEPS)
    run = freeze(start().train(0, 4)).train(4, 6)
    resumed = freeze(start(seed=1)).load(run.save()).train(6, STEPS)
    assert_same(resumed.sparsifier.latent_weights(), whole.sparsifier.latent_weights())
    assert resumed.zeros() == whole.zeros() == 96


@pytest.mark.parametrize("recipe", ["accumulate", "step(closure)", "scaler"])
def test_resume_under_other_recipes(recipe):
    recipe = RECIPES[recipe]
    whole = start(optimizer="adamw-fused", recipe=recipe).train(0, STEPS)
    run = start(optimizer="adamw-fused", recipe=recipe).train(0, 4)
    resumed = start(optimizer="adamw-fused", recipe=recipe, seed=1).load(run.save())
    resumed.loop.scaler.load_state_dict(run.loop.scaler.state_dict())
    assert_same(snapshot(resumed.train(4, STEPS)), snapshot(whole))

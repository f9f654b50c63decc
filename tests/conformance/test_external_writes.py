"""Values that others write into parameters between two steps are detected, and only those."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_feather as feather
from torch_feather import devices
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.passes import adopt_written

from .harness import TOTAL, assert_exact, assert_same, snapshot, start
from .models import MODELS


def settle(run, steps: int = 1):
    """Steps with lr 0, after which latent weights show the values taken over."""
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    return run.train(50, 50 + steps)


def trained(**settings):
    return start(optimizer="sgd", **settings).train(0, 6)


def merged(written: torch.Tensor, u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The written value if it differs from the effective weight, else the latent weight."""
    return torch.where(written != u, written, w)


def by_load_state_dict(run, values):
    state = run.model.state_dict()
    run.model.load_state_dict(state | {name: v.clone() for name, v in values.items()})


def by_copy_(run, values):
    with torch.no_grad():
        for name, p in run.case.weights(run.model).items():
            p.copy_(values[name])


def by_data_copy_(run, values):
    for name, p in run.case.weights(run.model).items():
        p.data.copy_(values[name])


def by_numpy(run, values):
    for name, p in run.case.weights(run.model).items():
        p.detach().numpy()[...] = values[name].numpy()


def by_new_storage(run, values):
    for name, p in run.case.weights(run.model).items():
        p.data = values[name].clone()


WRITERS = [by_load_state_dict, by_copy_, by_data_copy_, by_numpy, by_new_storage]


def test_thresholds_follow_external_writes():
    run = start(schedule="constant")
    with torch.no_grad():
        for p in run.case.weights(run.model).values():
            p.mul_(2.0)
    written = run.sparsifier.thresholds()
    run.sparsifier.masks()  # a check
    assert_same(written, run.sparsifier.thresholds())


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("model", ["mlp", "convnet", "attention"])
def test_written_values_become_the_latent_weights_where_they_differ(write, model):
    run = trained(model=model)
    u = {n: p.detach().clone() for n, p in run.case.weights(run.model).items()}
    w = run.sparsifier.latent_weights()
    # Half of the weights are written: some kept, some pruned ones, with values of their own.
    half = {n: torch.rand_like(v) < 0.5 for n, v in u.items()}
    written = {n: torch.where(half[n], torch.randn_like(v), v) for n, v in u.items()}
    write(run, written)
    settle(run)
    expected = {n: merged(written[n], u[n], w[n]) for n in u}
    assert_same(run.sparsifier.latent_weights(), expected)
    assert_exact(run)


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_writing_the_present_values_changes_nothing(write):
    run, other = trained(), trained()
    write(run, {n: p.detach().clone() for n, p in run.case.weights(run.model).items()})
    assert_same(snapshot(run), snapshot(other))
    assert_same(snapshot(run.train(6, 9)), snapshot(other.train(6, 9)))


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_a_swap_there_and_back_changes_nothing(write):
    """An evaluation with averaged weights: written in, evaluated, written back."""
    run, other = trained(model="convnet"), trained(model="convnet")
    u = {n: p.detach().clone() for n, p in run.case.weights(run.model).items()}
    average = {n: 0.9 * v + 0.01 for n, v in u.items()}
    for _ in range(3):
        write(run, average)
        run.model.eval()
        with torch.no_grad():
            run.model(run.case.batch(77)[0])
        run.model.train()
        write(run, u)
    assert_same(snapshot(run.train(6, 9)), snapshot(other.train(6, 9)))


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
def test_a_torch_ema_of_the_model_changes_nothing(optimizer):
    run, other = start("convnet", optimizer), start("convnet", optimizer)
    ema = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(6):
        run.train(step, step + 1)
        other.train(step, step + 1)
        ema.update_parameters(run.model)
    assert_same(snapshot(run), snapshot(other))


def test_a_single_changed_weight_is_detected():
    run = trained(model="convnet")
    before = run.sparsifier.latent_weights()
    run.model.head.weight.data[1, 2] += 1.0
    written = run.model.head.weight[1, 2].item()
    settle(run)
    after = run.sparsifier.latent_weights()
    changed = {n: int((before[n] != after[n]).sum()) for n in before}
    assert changed == {"stem.weight": 0, "depth.weight": 0, "point.weight": 0, "head.weight": 1}
    assert after["head.weight"][1, 2] == written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_flipped_sign_is_detected_at_any_position(dtype):
    """Only the highest bit of a number changes."""
    run = start("mlp", "sgd", dtype=dtype).train(0, 6)
    weight = run.model[0].weight.data.view(-1)
    for index in weight.nonzero().flatten()[:8].tolist():
        weight[index] *= -1
        written = weight[index].clone()
        assert run.sparsifier.latent_weights()["0.weight"].view(-1)[index] == written, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_negated_weights_are_detected(dtype):
    run = start("mlp", "sgd", dtype=dtype).train(0, 6)
    run.model[0].weight.data.neg_()
    written = run.model[0].weight.detach().clone()
    latent = run.sparsifier.latent_weights()["0.weight"]
    assert torch.equal(latent[written != 0], written[written != 0])


@pytest.mark.parametrize("through", ["no_grad", "data"])
def test_a_permutation_is_detected(through):
    """Two rows are exchanged, which changes no sum of the weights."""
    run = trained()
    weight = run.model[0].weight
    before = run.sparsifier.latent_weights()["0.weight"][:2]
    rows = weight.detach()[:2].clone()
    if through == "data":
        weight.data[[0, 1]] = rows[[1, 0]]
    else:
        with torch.no_grad():
            weight[[0, 1]] = rows[[1, 0]]
    settle(run)
    expected = merged(rows[[1, 0]], rows, before)
    assert torch.equal(run.sparsifier.latent_weights()["0.weight"][:2], expected)


def test_two_changes_whose_bits_cancel_are_detected():
    """One weight grows by a bit, another shrinks by one."""
    run = trained()
    bits = run.model[0].weight.data.view(torch.int32)
    kept = bits.flatten().nonzero().flatten()[:2]
    before = run.sparsifier.latent_weights()["0.weight"].flatten()[kept]
    bits.view(-1)[kept] += torch.tensor([4096, -4096], dtype=torch.int32)
    written = run.model[0].weight.detach().flatten()[kept].clone()
    settle(run)
    after = run.sparsifier.latent_weights()["0.weight"].flatten()[kept]
    assert torch.equal(after, written)
    assert (after != before).all()


def test_a_reinitialised_layer_is_detected():
    run = trained(model="convnet")
    u = run.model.point.weight.detach().clone()
    before = run.sparsifier.latent_weights()
    nn.init.kaiming_uniform_(run.model.point.weight)
    written = run.model.point.weight.detach().clone()
    settle(run)
    after = run.sparsifier.latent_weights()
    assert torch.equal(after["point.weight"], merged(written, u, before["point.weight"]))
    assert torch.equal(after["stem.weight"], before["stem.weight"])
    assert_exact(run)


def test_a_checkpoint_after_a_write_holds_what_was_written():
    run = trained()
    with torch.no_grad():
        run.model[0].weight.fill_(0.5)
    resumed = start(optimizer="sgd", seed=3).load(run.save())
    assert (resumed.sparsifier.latent_weights()["0.weight"] == 0.5).all()
    assert_same(snapshot(resumed.train(6, 8)), snapshot(run.train(6, 8)))


def test_loading_the_model_alone_starts_from_it():
    """Fine-tuning from a dense checkpoint that is loaded after attaching."""
    run = start(optimizer="sgd")
    dense = MODELS["mlp"].make(seed=9)
    run.model.load_state_dict(dense.state_dict())
    settle(run)
    for name, p in run.case.weights(dense).items():
        assert torch.equal(run.sparsifier.latent_weights()[name], p)


@pytest.mark.parametrize("trigger", ["step", "finalize", "state_dict"])
def test_loading_with_assign_orphans_a_parameter_and_is_an_error(trigger):
    run = trained()
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
    triggers = {
        "step": lambda: run.train(6, 7),
        "finalize": lambda: run.sparsifier.finalize(),
        "state_dict": lambda: run.optimizer.state_dict(),
    }
    with pytest.raises(feather.FeatherError, match=r"0\.weight"):
        triggers[trigger]()


def test_replacing_a_module_orphans_its_parameter_and_is_an_error():
    run = trained()
    run.model[0] = nn.Linear(6, 12)
    with pytest.raises(feather.FeatherError, match=r"0\.weight"):
        run.train(6, 7)


@pytest.mark.parametrize("wrapper", [nn.Sequential, torch.compile], ids=lambda f: f.__name__)
def test_wrapping_a_layer_after_sparsify_is_not_an_external_write(wrapper):
    """The parameter has another name, as with activation checkpointing."""
    run, other = trained(), trained()
    run.model[0] = wrapper(run.model[0])
    run.loop.forward = lambda x: other_forward(run.model, x)
    run.train(6, 8)
    other.train(6, 8)
    latents = (r.sparsifier.latent_weights().values() for r in (run, other))
    assert_same(*map(list, latents))


def other_forward(model, x):
    """The forward pass without running any compiled code."""
    first = getattr(model[0], "_orig_mod", model[0])
    return model[2](model[1](first(x)))


@pytest.mark.parametrize("replace", ["model and optimizer", "cast"])
def test_a_parameter_replaced_in_model_and_optimizer_is_followed(replace):
    """As frameworks do when they shard or cast; the latent weights follow."""
    run, other = trained(theta=0.5), trained(theta=0.5)
    old = run.model[0].weight
    new = nn.Parameter(old.detach().clone())
    run.model[0].weight = new
    parameters = run.optimizer.param_groups[0]["params"]
    parameters[[p is old for p in parameters].index(True)] = new
    if replace == "cast":
        run.model.double()
        run.loop.dtype = torch.float64
    run.train(6, 9)
    other.train(6, 9)
    for name, latent in run.sparsifier.latent_weights().items():
        expected = other.sparsifier.latent_weights()[name].to(latent.dtype)
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-6)
    assert_exact(run)


def test_reset_latents_restarts_from_what_the_parameters_hold():
    run = trained()
    u = {n: p.detach().clone() for n, p in run.case.weights(run.model).items()}
    assert any((w != u[n]).any() for n, w in run.sparsifier.latent_weights().items())
    run.sparsifier.reset_latents()
    assert_same(run.sparsifier.latent_weights(), u)
    assert run.sparsifier.step_count == 6
    with torch.no_grad():
        run.model[0].weight.normal_()
        written = run.model[0].weight.detach().clone()
    run.sparsifier.reset_latents()
    assert torch.equal(run.sparsifier.latent_weights()["0.weight"], written)
    run.train(6, 9)
    assert run.sparsifier.step_count == 9


def test_an_optimizer_that_replaces_storage_stays_exact():
    run = start("convnet", "sgd-reassigning")
    for step in range(TOTAL):
        run.train(step, step + 1)
        assert_exact(run)
    plain = start("convnet", "sgd").train(0, TOTAL)
    for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_identity_storage_and_aliases_of_parameters_never_change():
    run = start("convnet")
    identities = [(id(p), p.data_ptr()) for p in run.model.parameters()]
    alias = run.model.head.weight.detach()
    run.train(0, 4).save()
    run.load(run.save())
    assert [(id(p), p.data_ptr()) for p in run.model.parameters()] == identities
    assert torch.equal(alias, run.model.head.weight)
    run.sparsifier.finalize(force=True)
    assert [(id(p), p.data_ptr()) for p in run.model.parameters()] == identities


@pytest.mark.parametrize("on_device", [True, False], ids=["device", "cpu"])
@pytest.mark.parametrize("block", [1, 30, 1 << 24], ids=["alone", "few", "all"])
@pytest.mark.parametrize("which", [[0, 1, 2, 3, 4], [0, 2, 3], [4]])
def test_only_values_written_into_named_tensors_become_latent(which, block, on_device, monkeypatch):
    """For any number of neighbours per comparison, types and memory layouts."""
    monkeypatch.setattr("torch_feather.weights.passes.DEVICE_BLOCK", block)
    monkeypatch.setattr(devices, "synchronizes", lambda _: on_device)
    shapes, types = [(2, 3, 2, 2), (5, 4), (3,), (4, 4), (7,)], ["float32", "bfloat16"]
    parameters = [
        torch.randn(shape).to(getattr(torch, types[i % 2])) for i, shape in enumerate(shapes)
    ]
    parameters[0] = parameters[0].to(memory_format=torch.channels_last)
    weights = LatentWeights(parameters)
    effective = [torch.where(p.abs() > 0.5, p, torch.zeros_like(p)) for p in parameters]
    written = [torch.where(torch.rand(u.shape) < 0.3, 7.0, u).to(u.dtype) for u in effective]
    for one in written:
        one[0] = torch.nan
    adopt_written(weights, which, written, effective)
    for i, view in enumerate(weights.views):
        expected = parameters[i]
        if i in which:
            expected = torch.where(written[i] == effective[i], expected, written[i])
        torch.testing.assert_close(view, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("written", [None, 0, 2])
@pytest.mark.parametrize("method", ["asl", "str"])
def test_a_step_completes_gradients_as_a_call_before_it(method, written):
    """In the step, latent weights take the place of effective ones while these are read."""

    def train(called):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = feather.sparsify(model, optimizer, method, sparsity=0.8, total_steps=20)
        for step in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 300)).square().mean().backward()
            if step == 3 and written is not None:  # in the last range of a tensor
                model[written].weight.detach().numpy()[-1, -1] = 0.7
            if called:
                sparsifier.complete_gradients()
            optimizer.step()
        values = [*sparsifier.latent_weights().values(), *model.parameters()]
        return [*values, *sparsifier.thresholds().values()]

    pairs = zip(train(called=False), train(called=True), strict=True)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)

"""Weights that are pruned for good are 0 and have no gradient; nothing else is frozen."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrize

import torch_feather as feather
from torch_feather.errors import FeatherWarning, StateError

FORMS = ["finalize", "keep_zeros"]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 1, 8, 8, generator=generator)
    return x, torch.randint(10, (16,), generator=generator)


def fixed(form: str, make=torch.optim.SGD, **settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sparse network that trains on with a fixed mask."""
    torch.manual_seed(0)
    model = network()
    optimizer = make(model.parameters(), **({"lr": 0.1} | settings))
    sparsifier = feather.sparsify(model, optimizer, "st3", sparsity=0.9, total_steps=4)
    for number in range(4):
        loss(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsifier.finalize(keep_masks=form == "finalize")
    if form == "keep_zeros":
        feather.keep_zeros(model, optimizer)
    return model, optimizer


def loss(model: nn.Module, number: int) -> torch.Tensor:
    x, y = batch(number)
    return nn.functional.cross_entropy(model(x), y)


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() > 1]


@pytest.mark.parametrize("form", FORMS)
def test_pruned_weights_have_no_gradient(form):
    model, _ = fixed(form)
    for number in range(3):  # accumulated
        loss(model, number).backward()
        assert all((p.grad[p == 0] == 0).all() and (p.grad != 0).any() for p in weights(model))
    kept = [p.grad[p != 0] if p.dim() > 1 else p.grad for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in kept]).norm()
    assert float(clip_grad_norm_(model.parameters(), 1e9)) == pytest.approx(float(norm))


class Masked(nn.Module):
    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * self.mask


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
        (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 1e-1}),
        (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_training_is_that_of_weights_times_a_mask(form, make, settings):
    """As ST-3's authors train with a fixed mask: the network sees w m, and norms are clipped."""
    model, optimizer = fixed(form, make, **settings)
    other = copy.deepcopy(model)
    plain = make(other.parameters(), **({"lr": 0.1} | settings))
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    names = [name for name, p in other.named_parameters() if p.dim() > 1]
    for layer in (other[0], other[3]):
        mask = (layer.weight.detach() != 0).float()
        parametrize.register_parametrization(layer, "weight", Masked(mask))
    for number in range(8):
        for net, steps in ((model, optimizer), (other, plain)):
            steps.zero_grad()
            loss(net, number).backward()
            clip_grad_norm_(net.parameters(), 0.05)
            steps.step()
    for name in names:
        layer = other.get_submodule(name.rpartition(".")[0])
        torch.testing.assert_close(model.get_parameter(name), layer.weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(model.get_parameter(name) == 0, layer.weight == 0)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_call_no_hook_are_cleared_before_the_step(form):
    model, optimizer = fixed(form, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p != 0 for p in weights(model)]
    optimizer.step()
    for p, kept in zip(weights(model), before, strict=True):
        assert torch.equal(p != 0, kept)
        assert (p.grad[~kept] == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("make", "settings"),
    [(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}), (torch.optim.AdamW, {})],
    ids=["sgd", "adamw"],
)
def test_a_new_optimizer_keeps_the_zeros_too(form, make, settings):
    """They have no gradient, and its state has no momentum for them."""
    model, _ = fixed(form, momentum=0.9)
    zeros = [p == 0 for p in weights(model)]
    other = make(model.parameters(), lr=0.01, **settings)
    for number in range(5):
        loss(model, number).backward()
        other.step()
        other.zero_grad()
    assert all(torch.equal(p == 0, z) for p, z in zip(weights(model), zeros, strict=True))


def test_gradients_from_before_are_cleared():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model[3].weight[:, ::2] = 0
    loss(model, 0).backward()
    feather.keep_zeros(model, optimizer)
    assert (model[3].weight.grad[:, ::2] == 0).all()
    assert (model[3].weight.grad[:, 1::2] != 0).any()


def test_sparse_gradients_of_embeddings_are_cleared():
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1:4, ::2] = 0
    pruned = model[0].weight == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather.keep_zeros(model, optimizer, include="0.weight")
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([0, 2, 2, 5])).square().sum().backward()
        gradient = model[0].weight.grad
        assert gradient.is_sparse
        assert (gradient.to_dense()[pruned] == 0).all()
        assert (gradient.to_dense()[[0, 5]] != 0).all()
        optimizer.step()
    assert torch.equal(model[0].weight == 0, pruned)


def test_after_it_ends_gradients_are_whole_again():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model[3].weight[:, ::2] = 0
    feather.keep_zeros(model, optimizer).remove()
    loss(model, 0).backward()
    assert (model[3].weight.grad[:, ::2] != 0).any()
    assert not model[3].weight._backward_hooks


# --- layers that only start at zero ----------------------------------------------------------


def sparse_and_zero() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4, bias=False))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[0].weight[::2] = 0
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(number)
        (model(torch.randn(8, 16, generator=generator)) - 1).square().mean().backward()
        optimizer.step()


def test_a_layer_of_zeros_is_named():
    model = sparse_and_zero()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(FeatherWarning, match=r"1\.weight is 0.*exclude=\['1\.weight'\]"):
        feather.keep_zeros(model, optimizer)
    train(model, optimizer)
    assert not model[1].weight.any()


def test_the_advice_of_the_warning_trains_the_layer():
    model = sparse_and_zero()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feather.keep_zeros(model, optimizer, exclude=["1.weight"])
    train(model, optimizer)
    assert model[1].weight.all()
    assert not model[0].weight[::2].any()


def test_a_layer_that_was_pruned_is_kept_without_a_warning():
    """It took part in sparse training, so its zeros are the result; a new adapter did not."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with pytest.warns(FeatherWarning, match="Every weight"):
        sparsifier = feather.sparsify(
            model, optimizer, sparsity=0.75, total_steps=1, schedule="constant"
        )
    sparsifier.finalize()
    assert not model[1].weight.any()
    model.append(nn.Linear(16, 4))
    nn.init.zeros_(model[2].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feather.keep_zeros(model, optimizer)
    train(model, optimizer)
    assert not model[1].weight.any()
    assert model[2].weight.any()


def test_kept_weights_that_are_zero_are_trained_after_finalize():
    """k of N weights are pruned; further weights that start at 0 are no pruned weights."""
    model = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False))
    nn.init.zeros_(model[1].weight)  # 64 zeros, of which 32 are pruned
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(FeatherWarning, match="exactly 0"):
        sparsifier = feather.sparsify(
            model, optimizer, sparsity=0.25, total_steps=1, schedule="constant"
        )
    train(model, optimizer, 1)
    masks = sparsifier.masks()
    sparsifier.finalize(keep_masks=True)
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, 4)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 32
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copied_pair_raises_at_its_first_step_until_it_keeps_zeros_too(form, way):
    model, optimizer = fixed(form, momentum=0.9)
    other, its = way((model, optimizer))
    before = [p.detach().clone() for p in other.parameters()]
    loss(other, 0).backward()
    with pytest.raises(StateError, match=r"copy of an optimizer with a fixed mask .*keep_zeros"):
        its.step()
    assert all(map(torch.equal, before, other.parameters()))
    feather.keep_zeros(other, its)
    for net, steps in ((other, its), (model, optimizer)):
        for number in range(3):
            net.zero_grad()
            loss(net, number).backward()
            steps.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert sum(int((p == 0).sum()) for p in weights(other)) == round(0.9 * 2952)


def test_a_copy_is_a_plain_pair_after_masks_are_removed():
    model, optimizer = fixed("none", momentum=0.9)
    first, second = feather.keep_zeros(model, optimizer), feather.keep_zeros(model, optimizer)
    first.remove()
    with pytest.raises(StateError, match="fixed mask"):
        copy.deepcopy(optimizer).step()
    second.remove()
    copy.deepcopy(optimizer).step()
    assert "__getstate__" not in vars(copy.deepcopy(optimizer))


@pytest.mark.parametrize("form", FORMS)
def test_a_replaced_parameter_raises_before_its_zeros_are_lost(form):
    model, optimizer = fixed(form)
    new = nn.Parameter(model[3].weight.detach().clone())
    group = optimizer.param_groups[0]["params"]
    group[2] = model[3].weight = new
    loss(model, 0).backward()
    before = new.detach().clone()
    with pytest.raises(StateError, match="were replaced in this SGD"):
        optimizer.step()
    assert torch.equal(new, before)
    del group[2]  # a weight that is trained no more is no reason
    optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_values_that_other_code_writes_into_pruned_weights_are_not_lost_without_a_word(form):
    model, optimizer = fixed(form)
    zeros = [p == 0 for p in weights(model)]
    count = sum(int(z.sum()) for z in zeros)
    loss(model, 0).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        optimizer.step()
    model.load_state_dict(network().state_dict())
    with pytest.warns(FeatherWarning, match=f"wrote {count:,} values into weights"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        model.load_state_dict(network().state_dict())
        optimizer.step()
    assert all(map(torch.equal, zeros, [p == 0 for p in weights(model)]))

"""A small network, trained by one process and by several."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torch_feather as feather

STEPS, BATCH = 6, 16
SPARSITY = 0.8


def network(seed=0, dtype=torch.float64):
    """Sizes that 2 and 4 do not divide; of the last layer a fourth rank holds nothing."""
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 13), nn.ReLU(), nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def even_network(seed=0, dtype=torch.float64):
    """Sizes that parallelize_module can divide."""
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def images_network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)]
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *layers).to(dtype)


def data(model, step, part=0, parts=1, dtype=torch.float64):
    """The batch of a step, or one of the equal parts of it."""
    g = torch.Generator().manual_seed(step)
    width, classes = (16, 5) if isinstance(model[0], nn.Unflatten) else (12, 3)
    x = torch.randn(BATCH, width, generator=g, dtype=torch.float64).to(dtype)
    y = torch.randint(0, classes, (BATCH,), generator=g)
    return x.chunk(parts)[part], y.chunk(parts)[part]


def make_optimizer(model, kind="adamw"):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def attach(model, method="feather", kind="adamw", total_steps=STEPS, sparsity=SPARSITY, **options):
    optimizer = make_optimizer(model, kind)
    sparsifier = feather.sparsify(
        model, optimizer, method, sparsity=sparsity, total_steps=total_steps, **options
    )
    return optimizer, sparsifier


def step(model, optimizer, sparsifier, number, ranks=(0, 1), accumulate=1, clip=None, sync=None,
         dtype=torch.float64):  # fmt: skip
    """One step on this rank's part of the batch; `sync`: whether each part's gradients are."""
    rank, world = ranks
    optimizer.zero_grad()
    for part in range(accumulate):
        if sync == "last":
            model.set_requires_gradient_sync(part == accumulate - 1)
        x, y = data(model, number, rank * accumulate + part, world * accumulate, dtype)
        (F.cross_entropy(model(x), y) / accumulate).backward()
    if clip is not None:
        sparsifier.complete_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def mesh(*shape, names=("dp", "tp")):
    return init_device_mesh("cpu", shape, mesh_dim_names=names[: len(shape)])


def shard(model, on=None, units="layers", **options):
    """`fully_shard` in one unit per layer, or of the whole alone."""
    on = on or mesh(dist.get_world_size())
    if units == "layers":
        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=on, **options)
    return fully_shard(model, mesh=on, **options)


def whole(tensor):
    """The full tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wholes(tensors):
    return {name: whole(t) for name, t in tensors.items()}


def zeros(model):
    return sum(int((whole(m.weight) == 0).sum()) for m in model if hasattr(m, "weight"))


def assert_alike(many, one, exact=False):
    """A sharded run and one of a single process are equal."""
    assert many.step_count == one.step_count
    size = one.step.training.weights.size
    masks, expected = wholes(many.masks()), one.masks()
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name
    assert zeros(many.model) == zeros(one.model) == size - sum(int(m.sum()) for m in masks.values())
    assert many.sparsity == one.sparsity
    latents, expected = wholes(many.latent_weights()), one.latent_weights()
    for name, w in latents.items():
        if exact:
            assert torch.equal(w, expected[name]), name
        else:
            torch.testing.assert_close(w, expected[name], rtol=1e-9, atol=1e-11)
    for name, p in many.model.named_parameters():
        other = one.model.get_parameter(name)
        torch.testing.assert_close(whole(p), other, rtol=1e-9, atol=1e-11)


def compare(make=network, wrap=shard, ranks=None, steps=STEPS, way=nullcontext, recipe=None, **how):
    """Train with shards and in one process; both are equal after every step."""
    recipe = recipe or {}
    ranks = ranks or (dist.get_rank(), dist.get_world_size())
    alone = make()
    one_optimizer, one = attach(alone, **how)
    model = wrap(make())
    with way():
        optimizer, many = attach(model, **how)
        assert_alike(many, one)
        for number in range(steps):
            alone_recipe = {k: v for k, v in recipe.items() if k != "sync"}
            step(alone, one_optimizer, one, number, **alone_recipe)
            step(model, optimizer, many, number, ranks=ranks, **recipe)
            assert_alike(many, one)
        exact = round(one.target * one.step.training.weights.size)
        assert steps < many.target_step or zeros(model) == exact
    return model, optimizer, many, one

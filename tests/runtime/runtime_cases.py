"""What the tests of the runtime share: layers by themselves, networks without timing."""

import torch
from torch import nn
from torch.fx import Graph

from torch_feather.runtime import Choice, compile_sparse
from torch_feather.runtime.bound import Bound, Workspace
from torch_feather.runtime.kernels import Tile
from torch_feather.runtime.layer import Layer
from torch_feather.runtime.plan import Plan

TILE = Tile(3, 8, 1)
SPARSE, DENSE = Choice(True, TILE, 0.9), Choice(False, TILE, 0.9)
AIM = 2e-6  # of the largest result


class Every(dict):
    """One choice for whatever a network consists of, so that nothing is timed."""

    def __init__(self, choice):
        super().__init__(every=choice)
        self.choice = choice

    def get(self, name, default=None):
        return self.choice

    def __contains__(self, name):
        return True

    __getitem__ = get


def compiled(model, example, choice=SPARSE, threads=1):
    return compile_sparse(model, example, threads=threads, choices=Every(choice))


def pruned(module, sparsity=0.7):
    """With weights and biases of about 1, most weights 0, and statistics as after training."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.weight.copy_(sparse_weight(part.weight.shape, sparsity))
            if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
                if part.affine:
                    part.weight.normal_()
                    part.bias.normal_()
    return module.eval()


def sparse_weight(shape, sparsity=0.7):
    fan_in = max(1.0, (1 - sparsity) * shape[1:].numel())
    return torch.randn(shape) * (torch.rand(shape) > sparsity) / fan_in**0.5


def graph_of(layer, *inputs):
    """A graph of one layer."""
    graph = Graph()
    given = []
    for i, x in enumerate(inputs):
        given.append(graph.placeholder(f"x{i}"))
        given[-1].meta["val"] = x
    node = graph.call_function(layer, tuple(given))
    node.meta["val"] = layer(*inputs)
    graph.output(node)
    return graph


def spoiled(plan, batch, tile, threads=1):
    """A workspace in which all that is read before it is written is NaN."""
    bound = Bound(plan, {}, batch, tile, threads)
    workspace = Workspace(bound)
    workspace.memory.fill_(torch.nan)
    workspace.held = bound
    return workspace


def run_alone(layer, *inputs, tile=TILE, threads=1):
    """What a layer computes of a batch, in machine code."""
    plan = Plan.of(graph_of(layer, *inputs), [layer])
    workspace = spoiled(plan, len(inputs[0]), {layer.name: tile}, threads)
    result = workspace(*inputs)
    assert torch.equal(workspace(*inputs), result)  # as often as one likes
    return result


def error(result, wanted):
    """The largest, as a part of the largest number wanted."""
    assert result.shape == wanted.shape
    assert result.isfinite().all()
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    difference = (result.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
    return difference / (largest or 1.0)


def conv(channels, out, kernel, name="weight", sparsity=0.7, **options):
    """A layer with a random weight."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    groups = options.get("groups", 1)
    weight = sparse_weight(torch.Size((out, channels // groups, height, width)), sparsity)
    pairs = ("stride", "padding", "dilation")
    options = {
        key: (value, value) if key in pairs and isinstance(value, int) else value
        for key, value in options.items()
    }
    return Layer(name, weight, torch.randn(out), **options)

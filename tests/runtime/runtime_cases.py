"""Helpers of the runtime's tests: single layers, and networks that are compiled without timing."""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.fx import Graph
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from torch_feather import load_compiled, save_compiled
from torch_feather.runtime import LayerTuning, compile_sparse
from torch_feather.runtime.batch import BatchPlan
from torch_feather.runtime.kernels import Tile
from torch_feather.runtime.layer import Layer
from torch_feather.runtime.plan import Plan, Sparse
from torch_feather.runtime.workspace import Workspace

TILE = Tile(3, 8, 1)
SPARSE, DENSE = LayerTuning(True, TILE, 0.9), LayerTuning(False, TILE, 0.9)
TOLERANCE = 2e-6  # relative to the largest result


class SameForAll(dict):
    """Tuning results that are the same for every layer, so that no layer is timed."""

    def __init__(self, tuning):
        super().__init__(every=tuning)
        self.tuning = tuning

    def get(self, name, default=None):
        return self.tuning

    def __contains__(self, name):
        return True

    __getitem__ = get


def compiled(model, example, tuning=SPARSE, threads=1):
    return compile_sparse(model, example, threads=threads, tuning=SameForAll(tuning))


def pruned(module, sparsity=0.7):
    """Return the module with sparse weights and with statistics as after training."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, _ConvNd | nn.Linear):
                part.weight.copy_(sparse_weight(part.weight.shape, sparsity))
            if isinstance(part, nn.RNNBase):
                for name, weight in part.named_parameters():
                    if name.startswith("weight"):
                        weight.copy_(sparse_weight(weight.shape, sparsity))
            if isinstance(part, _BatchNorm) and part.running_mean is not None:
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
    """Return a graph of one layer."""
    graph = Graph()
    given = []
    for i, x in enumerate(inputs):
        given.append(graph.placeholder(f"x{i}"))
        given[-1].meta["val"] = x
    node = graph.call_function(layer, tuple(given))
    node.meta["val"] = layer(*inputs)
    graph.output(node)
    return graph


def workspace_of_nan(plan, batch, tiles, threads=1):
    """Return a workspace in which everything that is read before it is written is NaN."""
    workspace = Workspace(BatchPlan(plan, {}, batch, tiles, threads))
    workspace.memory.fill_(torch.nan)
    return workspace


def run_layer(layer, *inputs, tile=TILE, threads=1):
    """Return what a layer computes in machine code."""
    plan = Plan.build(graph_of(layer, *inputs), [layer])
    workspace = workspace_of_nan(plan, len(inputs[0]), {layer.name: tile}, threads)
    result = workspace(*inputs)
    assert torch.equal(workspace(*inputs), result)  # a second call gives the same bits
    return result


def error(result, expected):
    """Return the largest error relative to the largest expected value."""
    assert result.shape == expected.shape
    assert result.isfinite().all()
    if not expected.numel():
        return 0.0
    difference = (result.double() - expected.double()).abs().max().item()
    return difference / (expected.abs().max().item() or 1.0)


def conv(channels, out, kernel, name="weight", sparsity=0.7, **options):
    """Return a layer with a random sparse weight."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    groups = options.get("groups", 1)
    weight = sparse_weight(torch.Size((out, channels // groups, height, width)), sparsity)
    pairs = ("stride", "padding", "dilation")
    options = {
        key: (value, value) if key in pairs and isinstance(value, int) else value
        for key, value in options.items()
    }
    return Layer(name, weight, torch.randn(out), **options)


def sparse_layers(network):
    """Return the names of the weights of the layers that run sparse, one for each step."""
    return [s.layer.name for s in network.plan.steps if isinstance(s, Sparse) if not s.layer.pools]


def check(model, shape, batches=(2, 1, 5), tuning=SPARSE, threads=1):
    """Compile a model, compare it with itself in float64, also as a file; return the network."""
    network = compiled(model, torch.randn(batches[0], *shape), tuning, threads)
    exact = copy.deepcopy(model).double()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_compiled(network, Path(folder, "net"), batch_sizes=batches)
        loaded = load_compiled(Path(folder, "net"))
        for batch in batches:
            x = torch.randn(batch, *shape)
            found, expected = tree_leaves(network(x)), tree_leaves(exact(x.double()))
            again, saved = tree_leaves(network(x)), tree_leaves(loaded(x))
            for result, reference, *same in zip(found, expected, again, saved, strict=True):
                assert error(result, reference) < TOLERANCE
                assert all(torch.equal(other, result) for other in same)
    return network

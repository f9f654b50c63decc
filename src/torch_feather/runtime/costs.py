"""What weights cost in milliseconds, for training that aims at latency."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..errors import ConfigurationError
from ..prunable import unwrap
from .capture import capture
from .choose import choose
from .kernels import llvm
from .layer import Layer, MaxPool
from .plan import suits


def layer_milliseconds(
    model: nn.Module, example_input: Tensor, sparsity: float, threads: int = 1
) -> dict[str, float]:
    """Milliseconds that a weight which is kept costs, by weight name, measured on this CPU.

    Every layer runs alone as `compile_sparse` would run it, with the given share of zeros at random
    places, and once more with nothing but zeros. What is left of its time then (writing the result)
    no pruning saves; the rest is divided by the number of weights. For `feather-flops` and
    `FlopsBiased(costs=...)`, whose budget then is in milliseconds of the kept weights.

    Args:
        model: on any device; only the shapes of its weights matter, and it is not changed.
        example_input: (batch, ...) float32; the times are those of one call with it.
        sparsity: share of zeros in every layer, in [0, 1).
        threads: of the sparse layers.

    Returns:
        Costs above 0. Weights of layers that cannot run sparse are not in it.

    Raises:
        ConfigurationError: no such sparsity.
        CaptureError: torch.export cannot follow the model.
        RuntimeMissingError: llvmlite is not installed.
    """
    if not 0 <= sparsity < 1:
        raise ConfigurationError(f"sparsity is a share of zeros in [0, 1), got {sparsity!r}.")
    llvm()
    model = copy.deepcopy(unwrap(model)).float().cpu().eval()
    names = {id(p): name for name, p in model.named_parameters()}
    costs: dict[str, float] = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        graph = capture(model, example_input.float().cpu()).module.graph
        batch = next(n for n in graph.nodes if n.op == "placeholder").meta["val"].shape[0]
        for node in graph.nodes:
            layer = node.target
            if isinstance(layer, Layer) and not isinstance(layer, MaxPool) and suits(node, batch):
                used = layer.name.partition("@")[0]  # of a weight that is used again
                try:
                    name = names[id(model.get_parameter(used))]
                except AttributeError:  # computed from other parameters
                    continue
                cost = _cost(node, layer, len(example_input), sparsity, threads)
                costs[name] = costs.get(name, 0.0) + cost
    return costs


def _cost(node: Node, layer: Layer, batch: int, sparsity: float, threads: int) -> float:
    kept = max(1, round((1 - sparsity) * layer.weight.numel()))
    generator = torch.Generator().manual_seed(0)  # the user's stays as it is
    order = torch.randperm(layer.weight.numel(), generator=generator)
    zeros = torch.zeros(layer.weight.numel())
    some = zeros.index_fill(0, order[:kept], 1.0)
    times = []
    for flat in (some, zeros):
        pruned = replace(layer, weight=flat.reshape(layer.weight.shape))
        time = choose(node, pruned, batch, threads).sparse_ms
        assert time is not None
        times.append(time)
    whole, empty = times
    return max(whole - empty, 0.1 * whole) / kept  # a short layer's difference may be all noise

"""The cost of a weight in milliseconds, for training that targets latency."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..errors import ConfigurationError
from ..prunable import unwrap
from .capture import capture
from .kernels import llvm
from .layer import Layer
from .plan import can_run_sparse
from .tuning import tune_layer


def layer_milliseconds(
    model: nn.Module, example_input: Tensor, sparsity: float, threads: int = 1
) -> dict[str, float]:
    """Measure the cost of each nonzero weight in milliseconds on this CPU.

    Each layer runs alone, as `compile_sparse` would run it: once with the given sparsity, zeros at
    random positions, and once with zeros only. The second time (writing the result) is not saved by
    pruning. The difference, divided by the number of nonzero weights, is the cost of a weight.

    Pass the result to `feather-flops` or `FlopsBiased(costs=...)`. A cost budget is then in
    milliseconds.

    Args:
        model: on any device. Only the shapes of its weights matter; it is not changed.
        example_input: (batch, ...) float32; the times are those of one call with it.
        sparsity: fraction of zeros in each layer, in [0, 1).
        threads: number of threads of the sparse layers.

    Returns:
        Positive costs by weight name. Weights of LSTM and GRU, and of layers that cannot run
        sparse, are missing.

    Raises:
        ConfigurationError: the sparsity is not in [0, 1).
        CaptureError: torch.export cannot capture the model.
        RuntimeMissingError: llvmlite is not installed.

    Example:
        >>> import torch
        >>> from torch_feather.runtime import layer_milliseconds
        >>> costs = layer_milliseconds(torch.nn.Linear(64, 8), torch.zeros(1, 64), sparsity=0.9)
        >>> list(costs)
        ['weight']
    """
    if not 0 <= sparsity < 1:
        raise ConfigurationError(f"sparsity must be in [0, 1), got {sparsity!r}.")
    llvm()
    model = copy.deepcopy(unwrap(model)).float().cpu().eval()
    names = {id(p): name for name, p in model.named_parameters()}
    costs: dict[str, float] = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        graph = capture(model, example_input.float().cpu()).module.graph
        batch = next(n for n in graph.nodes if n.op == "placeholder").meta["val"].shape[0]
        for node in graph.nodes:
            layer = node.target
            if not isinstance(layer, Layer) or layer.pools:
                continue
            if not can_run_sparse(node, batch):
                continue
            used = layer.name.partition("@")[0]  # without the number of a repeated use
            try:
                name = names[id(model.get_parameter(used))]
            except AttributeError:  # computed from other parameters
                continue
            cost = _cost(node, layer, len(example_input), sparsity, threads)
            costs[name] = costs.get(name, 0.0) + cost
    return costs


def _cost(node: Node, layer: Layer, batch: int, sparsity: float, threads: int) -> float:
    kept = max(1, round((1 - sparsity) * layer.weight.numel()))
    generator = torch.Generator().manual_seed(0)  # leave the global generator unchanged
    order = torch.randperm(layer.weight.numel(), generator=generator)
    zeros = torch.zeros(layer.weight.numel())
    some = zeros.index_fill(0, order[:kept], 1.0)
    times = []
    for flat in (some, zeros):
        pruned = replace(layer, weight=flat.reshape(layer.weight.shape), factors=())
        time = tune_layer(node, pruned, batch, threads).sparse_ms
        assert time is not None
        times.append(time)
    sparse, empty = times
    return max(sparse - empty, 0.1 * sparse) / kept  # for short layers the difference may be noise

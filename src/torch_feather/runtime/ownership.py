"""Memory that a network shares with the model: all weights during compilation, none after it.

A copy of the model would double the memory of its weights before anything is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .layer import Layer
from .plan import Plan
from .recurrent import Recurrent
from .steps import Torch


def shared_parameters(model: nn.Module) -> dict[int, Any]:
    """Return parameters that share the memory of a model's, by the `id` of these.

    `copy.deepcopy(model, memo)` with this memo copies no weights. The copy is then put into eval
    mode. Modules that change weights at this moment, such as adapters that merge theirs, get none.

    Args:
        model: the model, which must not be called in a way that changes its parameters.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> weight = shared_parameters(model)[id(model.weight)]
        >>> weight.data_ptr() == model.weight.data_ptr()
        True
    """
    switches = (nn.Module.train, nn.Module.eval)
    if any((type(m).train, type(m).eval) != switches for m in model.modules() if m.training):
        return {}
    return {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter and not p.is_inference() and p.layout == torch.strided
    }


class Ownership:
    """Gives a compiled network memory of its own.

    Args:
        model: the copy that was captured.

    Example:
        >>> weight = torch.ones(3, 4)
        >>> layer = Layer("weight", weight, torch.zeros(3))
        >>> graph = torch.fx.Graph()
        >>> _ = graph.output(graph.call_function(layer, (graph.placeholder("x"),)))
        >>> model = nn.Module()
        >>> model.weight = nn.Parameter(weight)
        >>> ownership = Ownership(model)
        >>> module = GraphModule(nn.Module(), graph)
        >>> ownership.own_layers(module, Plan.build(graph, []))
        >>> layer.weight.data_ptr() == weight.data_ptr()
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self._shared = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def own_constants(self, module: GraphModule) -> None:
        """Copy all values of a captured graph except the weights of layers. Drop unused ones.

        Args:
            module: the graph, in which layers are fused. No plan may have been built for it.
        """
        used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
        for prefix, owner in module.named_modules():
            for name, value in list(owner.named_parameters(recurse=False)):
                path = f"{prefix}.{name}".lstrip(".")
                if any(path == u or path.startswith(f"{u}.") for u in used):
                    value.data = self._own(value.data)
                else:
                    delattr(owner, name)
        for node in module.graph.nodes:
            if isinstance(node.target, Recurrent):
                node.target.weights = [self._own(w) for w in node.target.weights]
            elif isinstance(node.target, Layer):
                node.target.bias = self._own(node.target.bias)

    def own_layers(self, module: GraphModule, plan: Plan) -> None:
        """Copy the weights of layers that run densely, and free those of the others.

        Args:
            module: the captured graph.
            plan: its steps. Layers that run sparse have taps.
        """
        dense = called_layers(plan)
        for node in module.graph.nodes:
            layer = node.target
            if not isinstance(layer, Layer) or layer.pools:
                continue
            if layer in dense or layer.kernel_form is not layer:
                layer.fold()
                layer.weight = self._own(layer.weight)
            elif layer.taps is not None:
                layer.release()

    def _own(self, value: Tensor) -> Tensor:
        is_shared = value.untyped_storage().data_ptr() in self._shared
        return value.clone() if is_shared else value


def called_layers(plan: Plan) -> set[Layer]:
    """Return the layers that a plan computes densely.

    Args:
        plan: steps of a network.

    Example:
        >>> called_layers(Plan(torch.fx.Graph()))
        set()
    """
    targets = [step.node.target for step in plan.steps if isinstance(step, Torch)]
    return {layer for layer in targets if isinstance(layer, Layer)}

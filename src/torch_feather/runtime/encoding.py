"""Plans, graphs and their values as JSON and arrays, for files of compiled networks."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from ..errors import StateError
from .layer import Layer
from .plan import Plan
from .planes import PlaneLayout, Planes
from .recurrent import Direction, Recurrent
from .steps import Attention, Copy, Operation, Pointwise, Recurrence, Sparse, Step, Torch
from .stored_weights import StoredWeight, load_taps, load_weight, store_taps, store_weight
from .taps import Taps

PLANES = ("channels", "height", "width", "shape", "linear", "tokens", "first", "phases")
RECURRENCE = ("cell", "number", "layers", "steps", "batch_first")
ATTENTION = ("heads", "queries", "keys", "scale", "is_causal", "dims")
LOCATIONS = {"operator": operator, "math": math, "torch": torch}


class Encoder:
    """Encodes a plan.

    Args:
        dtype: type in which the weights of layers are stored.

    Attributes:
        arrays: the arrays that the encoded values refer to, by name.

    Example:
        >>> Encoder().value((1, None, float("inf")))
        {'tuple': [1, None, {'float': 'inf'}]}
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._dtype = dtype
        self._names: dict[int, str] = {}
        self._alive: list[Any] = []  # objects whose ids are in `_names`
        self._planes: dict[Planes, int] = {}
        self._planes_data: list[Any] = []
        self._layouts: dict[PlaneLayout, int] = {}
        self._layers: dict[Layer, int] = {}
        self._layer_data: list[Any] = []

    def array(self, value: np.ndarray | Tensor) -> str:
        """Return the name of an array; the same for the same array."""
        if id(value) not in self._names:
            name = self._names[id(value)] = f"array.{len(self.arrays)}"
            self._alive.append(value)
            data = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            self.arrays[name] = np.asarray(data, order="C")  # keeps numbers without dimensions
        return self._names[id(value)]

    def value(self, value: Any) -> Any:
        """Return an argument of a function of PyTorch as JSON.

        Raises:
            StateError: it has a type that files do not hold.
        """
        if value is None or isinstance(value, bool | str) or type(value) is int:
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.value(v) for v in value]}
        if isinstance(value, Node):
            return {"node": value.name}
        if isinstance(value, slice):
            return {"slice": [self.value(v) for v in (value.start, value.stop, value.step)]}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return {"torch": str(value).removeprefix("torch.")}
        raise StateError(
            f"Files of compiled networks cannot hold values of {type(value).__name__}."
        )

    def target(self, target: Any) -> Any:
        """Return a function as JSON.

        Raises:
            StateError: it is no function of PyTorch's aten library or of Python.
        """
        if isinstance(target, Layer):
            return {"layer": self.layer(target)}
        if isinstance(target, Recurrent):
            weights = [self._recurrent_weight(target.name, w) for w in target.weights]
            return {"recurrent": target.options | {"name": target.name, "weights": weights}}
        if isinstance(target, OpOverload) and target.namespace == "aten":
            return {"aten": [target._schema.name.partition("::")[2], target._overloadname]}
        name = getattr(target, "__name__", "")
        for place, module in LOCATIONS.items():
            if (place != "torch" or name.startswith("sym_")) and (
                getattr(module, name, None) is target
            ):
                return {place: name}
        raise StateError(
            f"The compiled network calls {target}, which files of compiled networks cannot hold. "
            "Save the model and the tuning results instead, and compile again."
        )

    def layer(self, layer: Layer) -> int:
        """Return the number of a layer."""
        if layer not in self._layers:
            self._layers[layer] = len(self._layers)
            options = layer.options | {"packs": layer.packs}
            self._layer_data.append(
                {
                    "kind": type(layer).__name__,
                    "name": layer.name,
                    "options": {name: self.value(value) for name, value in options.items()},
                    "shape": list(layer.weight.shape),
                    "bias": self.array(layer.bias),
                }
            )
        return self._layers[layer]

    def _set_weight(self, layer: Layer, taps: Taps | None) -> None:
        """Store the weight of a layer, which runs sparse if there are taps."""
        data = self._layer_data[self.layer(layer)]
        if "weight" in data or (layer.pools and taps is None):
            return
        dtype = torch.float32 if layer.pools else self._dtype
        if taps is None:
            stored = store_weight(layer.name, layer.folded_weight().detach().numpy(), dtype)
        else:
            stored = store_taps(layer, taps, dtype)
        data["weight"] = self._stored(stored) | {"sparse": taps is not None}

    def _recurrent_weight(self, name: str, weight: Tensor) -> dict[str, Any]:
        """Return a weight or bias of a recurrent layer that runs densely as JSON."""
        dtype = torch.float32 if weight.dim() == 1 else self._dtype
        stored = store_weight(name, weight.detach().numpy(), dtype)
        return self._stored(stored) | {"shape": list(weight.shape)}

    def _stored(self, stored: StoredWeight) -> dict[str, Any]:
        arrays = {name: self.array(array) for name, array in stored.arrays.items()}
        return stored.description | {"arrays": arrays}

    def planes(self, planes: Planes | None) -> int | None:
        """Return the number of planes."""
        if planes is None:
            return None
        if planes not in self._planes:
            layout = planes.layout.root()
            stored = {
                "layout": self._layouts.setdefault(layout, len(self._layouts)),
                "base": self.planes(planes.base),
            }
            for name in PLANES:
                stored[name] = self.value(getattr(planes, name))
            self._planes[planes] = len(self._planes_data)
            self._planes_data.append(stored)
        return self._planes[planes]

    def step(self, step: Step) -> dict[str, Any]:
        """Return a step as JSON."""
        if isinstance(step, Torch):
            if isinstance(step.node.target, Layer):
                self._set_weight(step.node.target, None)
            return {"kind": "Torch", "node": step.node.name}
        stored: dict[str, Any] = {"kind": type(step).__name__, "out": self.planes(step.out)}
        if isinstance(step, Sparse):
            self._set_weight(step.layer, step.taps)
            residual = self.planes(step.residual)
            return stored | {
                "layer": self.layer(step.layer), "x": self.planes(step.x), "residual": residual,
            }  # fmt: skip
        if isinstance(step, Copy):
            numbers = {n: self.value(getattr(step, n)) for n in ("size", "stride", "phases")}
            value = self.value(step.padding_value)
            return stored | numbers | {"source": step.source.name, "padding_value": value}
        stored["x"] = [self.planes(x) for x in step.x]
        if isinstance(step, Recurrence):
            numbers = {n: getattr(step, n) for n in RECURRENCE}
            for _, recurrent in step.directions:  # the other layer has a step of its own
                self._set_weight(recurrent, Taps.from_layer(recurrent))
            directions = [list(map(self.layer, direction)) for direction in step.directions]
            states = [node.name for node in step.states]
            return stored | numbers | {
                "node": step.node.name, "states": states, "directions": directions,
            }  # fmt: skip
        if isinstance(step, Pointwise):
            return stored | {"node": step.node.name}
        if isinstance(step, Attention):
            numbers = {name: getattr(step, name) for name in ATTENTION}
            return stored | numbers | {"mask": step.mask and step.mask.name}
        for name in ("weight", "bias", "index"):
            array = getattr(step, name)
            stored[name] = None if array is None else self.array(array)
        for name in ("name", "activation", "eps", "stride", "groups"):
            stored[name] = self.value(getattr(step, name))
        return stored

    def plan(self, plan: Plan, constants: Mapping[str, Any]) -> dict[str, Any]:
        """Return a plan as JSON.

        Args:
            plan: the plan.
            constants: values of the nodes that do not depend on the input, by name.
        """
        steps = [self.step(step) for step in plan.steps]
        called = {s.node for s in plan.steps if isinstance(s, Torch | Pointwise)}
        planes = {node.name: self.planes(p) for node, p in plan.planes.items()}
        nodes, used = [], set()
        for node in plan.graph.nodes:
            stored: dict[str, Any] = {"name": node.name, "op": node.op}
            if node in called:
                stored["target"] = self.target(node.target)
                stored["args"] = self.value(node.args)
                stored["kwargs"] = {k: self.value(v) for k, v in node.kwargs.items()}
            if node.op == "output":
                stored["args"] = self.value(node.args)
            if node in called or node.op == "output":
                used.update(node.all_input_nodes)
            nodes.append(stored)
        used.update(s.source for s in plan.steps if isinstance(s, Copy))
        used.update(n for s in plan.steps if isinstance(s, Recurrence) for n in s.states)
        used.update(s.mask for s in plan.steps if isinstance(s, Attention) and s.mask is not None)
        values = {}
        for node in used:
            if node.name in constants:
                value = constants[node.name]
                if not isinstance(value, Tensor):
                    self.value(value)
                values[node.name] = self.array(value)
        layouts = [
            [layout.height, layout.width, layout.pad_y, layout.pad_x] for layout in self._layouts
        ]
        last_use = [[self.planes(p), i] for p, i in plan.last_use.items()]
        return {
            "nodes": nodes, "steps": steps, "node_planes": planes, "planes": self._planes_data,
            "layouts": layouts, "layers": self._layer_data, "constants": values,
            "last_use": last_use,
        }  # fmt: skip


class Decoder:
    """Decodes a plan.

    Args:
        stored: what `Encoder.plan` returned.
        arrays: its arrays.

    Attributes:
        plan: the plan.
        constants: values of the nodes that do not depend on the input, by name.

    Example:
        >>> encoder = Encoder()
        >>> stored = encoder.plan(Plan(Graph()), {})
        >>> Decoder(stored, encoder.arrays).plan.steps
        []
    """

    def __init__(self, stored: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.layers, self._taps = list[Layer](), list[Taps | None]()
        for data in stored["layers"]:
            self._read_layer(data)
        self._layouts = [PlaneLayout(h, w) for h, w, _, _ in stored["layouts"]]
        for layout, (h, w, pad_y, pad_x) in zip(self._layouts, stored["layouts"], strict=True):
            layout.require(h, w, pad_y, pad_x)
        self._planes: list[Planes] = []
        for data in stored["planes"]:
            self._planes.append(self._read_planes(data))
        self._nodes: dict[str, Node] = {}
        graph = Graph()
        for data in stored["nodes"]:
            self._nodes[data["name"]] = self._read_node(graph, data)
        planes = {self._nodes[n]: self._planes[i] for n, i in stored["node_planes"].items()}
        last_use = {self._planes[i]: step for i, step in stored["last_use"]}
        steps = [self._read_step(data) for data in stored["steps"]]
        self.plan = Plan(graph, steps, planes, last_use)
        self.constants = {
            name: torch.from_numpy(arrays[a]) for name, a in stored["constants"].items()
        }

    def value(self, stored: Any) -> Any:
        """Return an argument of a function."""
        if not isinstance(stored, dict):
            return stored
        ((kind, content),) = stored.items()
        if kind == "float":
            return float(content)
        if kind in ("tuple", "list"):
            values = [self.value(v) for v in content]
            return tuple(values) if kind == "tuple" else values
        if kind == "slice":
            return slice(*(self.value(v) for v in content))
        if kind == "node":
            return self._nodes[content]
        return torch.device(content) if kind == "device" else getattr(torch, content)

    def _target(self, stored: Mapping[str, Any]) -> Any:
        ((kind, content),) = stored.items()
        if kind == "layer":
            return self.layers[content]
        if kind == "recurrent":
            weights = [load_weight(w["shape"], self._stored(w)) for w in content["weights"]]
            return Recurrent(**{**content, "weights": weights})
        if kind == "aten":
            name, overload = content
            return getattr(getattr(torch.ops.aten, name), overload)
        return getattr(LOCATIONS[kind], content)

    def _read_node(self, graph: Graph, data: Mapping[str, Any]) -> Node:
        op, name = data["op"], data["name"]
        if op == "output":
            return graph.output(*self.value(data["args"]))
        if op == "placeholder":
            return graph.create_node("placeholder", name, name=name)
        if op == "get_attr":
            return graph.create_node("get_attr", name, name=name)
        if "target" not in data:  # computed in planes
            return graph.create_node("call_function", in_planes, name=name)
        kwargs = {k: self.value(v) for k, v in data["kwargs"].items()}
        args, target = self.value(data["args"]), self._target(data["target"])
        return graph.create_node("call_function", target, args, kwargs, name=name)

    def _read_layer(self, data: Mapping[str, Any]) -> None:
        kinds: list[Any] = [Layer, *Layer.__subclasses__()]
        (kind,) = (c for c in kinds if c.__name__ == data["kind"])
        bias = torch.from_numpy(self._arrays[data["bias"]])
        weight, stored = torch.zeros(()).expand(data["shape"]), None  # only its shape is used
        if "weight" in data:
            stored = self._stored(data["weight"])
            if not data["weight"]["sparse"]:
                weight = load_weight(tuple(data["shape"]), stored)
        options = {name: self.value(value) for name, value in data["options"].items()}
        layer = kind(data["name"], weight, bias, **options)
        self.layers.append(layer)
        if stored is not None and data["weight"]["sparse"]:
            layer.taps = load_taps(layer, stored)
        self._taps.append(layer.taps)

    def _stored(self, data: Mapping[str, Any]) -> StoredWeight:
        arrays = {name: self._arrays[a] for name, a in data["arrays"].items()}
        return StoredWeight(dict(data), arrays)

    def _read_planes(self, data: Mapping[str, Any]) -> Planes:
        base = None if data["base"] is None else self._planes[data["base"]]
        values = {name: self.value(data[name]) for name in PLANES}
        return Planes(self._layouts[data["layout"]], base=base, **values)

    def _read_step(self, data: Mapping[str, Any]) -> Step:
        if data["kind"] == "Torch":
            return Torch(self._nodes[data["node"]])
        out = self._planes[data["out"]]
        if data["kind"] == "Sparse":
            taps = self._taps[data["layer"]]
            assert taps is not None
            residual = None if data["residual"] is None else self._planes[data["residual"]]
            layer = self.layers[data["layer"]]
            return Sparse(layer, taps, self._planes[data["x"]], out, residual)
        if data["kind"] == "Copy":
            numbers = {f.name: self.value(data[f.name]) for f in fields(Copy)[2:]}
            return Copy(self._nodes[data["source"]], out, **numbers)
        x = tuple(self._planes[i] for i in data["x"])
        if data["kind"] == "Recurrence":
            directions = tuple(
                Direction(*(self.layers[i] for i in pair)) for pair in data["directions"]
            )
            states = tuple(self._nodes[name] for name in data["states"])
            numbers = {n: data[n] for n in RECURRENCE}
            numbers |= {"node": self._nodes[data["node"]], "x": x, "out": out}
            return Recurrence(directions=directions, states=states, **numbers)
        if data["kind"] == "Attention":
            mask = None if data["mask"] is None else self._nodes[data["mask"]]
            numbers = {name: data[name] for name in ATTENTION}
            return Attention(x, out, **numbers, mask=mask)
        if data["kind"] == "Pointwise":
            return Pointwise(self._nodes[data["node"]], x, out)
        arrays: dict[str, Any] = {
            n: data[n] and self._arrays[data[n]] for n in ("weight", "bias", "index")
        }
        numbers = {n: data[n] for n in ("activation", "eps", "groups")}
        stride = self.value(data["stride"])
        return Operation(data["name"], x, out, stride=stride, **arrays, **numbers)


def in_planes() -> None:
    """Stand for the function of a value that a kernel computes.

    Example:
        >>> in_planes()
    """

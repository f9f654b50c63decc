"""Multiply-adds of a model, dense and sparse, per weight.

Counted is what weights do in convolutions (transposed ones too), linear and bilinear layers
(Transformers' `Conv1D` too) and the projections of `MultiheadAttention`: each weight makes one
multiply-add per position that it is applied to. Convolutions count every output position with the
whole kernel, border included, as published numbers do; transposed ones every input position. A
module that is called twice counts twice, and tied weights count wherever they are used.

Not counted: products of activations with each other (attention scores and their sums over
values), biases, norms, activations, pooling, embeddings, recurrent layers, and weights that a
model uses through functions instead of the modules above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from ..errors import ConfigurationError
from ..prunable import default_weights, unwrap
from ..weights.shards import count_nonzero, reshard


@dataclass(frozen=True)
class LayerFlops:
    """Multiply-adds of one weight tensor, for one sample.

    `name` is the weight's dotted name (``"layer1.0.conv1.weight"``), `kind` the class of the
    module that uses it; `sparse` counts only the weights that are not zero.
    """

    name: str
    kind: str
    dense: int
    sparse: int
    weight_shape: tuple[int, ...]


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of one sample; `layers` in the order of the model's modules."""

    layers: list[LayerFlops]

    @property
    def dense(self) -> int:
        """All multiply-adds, zeros included."""
        return sum(layer.dense for layer in self.layers)

    @property
    def sparse(self) -> int:
        """Multiply-adds with weights that are not zero."""
        return sum(layer.sparse for layer in self.layers)


def count_flops(model: nn.Module, example_input: Any) -> Flops:
    """Count the multiply-adds of one forward pass, per sample; see the module for what counts.

    Runs the model once, in eval mode and without gradients, and leaves it as it was.

    Args:
        model: any module. What torch.compile made of it is not run, nor DistributedDataParallel:
            the module inside is.
        example_input: a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments. The first dimension of the first tensor in it is the batch, by which
            the counts are divided (and rounded, where a layer's work is not per sample).

    Returns:
        Flops: `.dense` and `.sparse` totals and `.layers`. A layer that the pass did not reach
        has 0. On the meta device, where weights have no values, sparse equals dense.

    Raises:
        ConfigurationError: no tensor in `example_input`, an empty batch, or no layer of the
            counted kinds was reached.
    """
    batch = _batch_size(example_input)
    model = unwrap(model)
    counted: dict[str, nn.Module] = {
        name.replace("_orig_mod.", "").removesuffix("_orig_mod"): module
        for name, module in model.named_modules()
        if default_weights(module)
    }
    dense: Counter[str] = Counter()
    sparse: Counter[str] = Counter()

    def add_uses(prefix: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for attribute, weight, positions in _uses(module, args, kwargs, output):
            name = _join(prefix, attribute)
            nonzero = weight.numel() if weight.is_meta else count_nonzero(weight)
            dense[name] += positions * weight.numel()
            sparse[name] += positions * nonzero

    with ExitStack() as undo:
        for name, module in counted.items():
            hook = partial(add_uses, name)
            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        undo.enter_context(_plain_evaluation(model))
        undo.callback(reshard, model)
        _call(model, example_input)

    if not any(dense.values()):
        raise ConfigurationError(
            f"{type(model).__name__} called no convolution, linear or attention module that has "
            "weights, so there is nothing to count."
        )
    return Flops(
        [
            LayerFlops(
                name=name,
                kind=type(module).__name__,
                dense=_per_sample(dense[name], batch),
                sparse=_per_sample(sparse[name], batch),
                weight_shape=tuple(weight.shape),
            )
            for prefix, module in counted.items()
            for name, weight in _weights(prefix, module)
        ]
    )


def _uses(
    module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> Iterator[tuple[str, Tensor, int]]:
    """What one call did: (weight's name in `module`, weight, positions it was applied to)."""
    if isinstance(module, nn.MultiheadAttention):
        # `out_proj` is used as a function, so a hook on it would never fire.
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = (
            _positions(given[name], given[name].shape[-1]) for name in ("query", "key", "value")
        )
        if module.in_proj_weight is not None:
            for rows, positions in zip(
                module.in_proj_weight.chunk(3), (query, key, value), strict=True
            ):
                yield "in_proj_weight", rows, positions
        else:
            yield "q_proj_weight", module.q_proj_weight, query
            yield "k_proj_weight", module.k_proj_weight, key
            yield "v_proj_weight", module.v_proj_weight, value
        yield "out_proj.weight", module.out_proj.weight, query
        return
    first = args[0] if args else next(iter(kwargs.values()))
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, _ConvTransposeNd):
        positions = _positions(first, module.in_channels)
    elif isinstance(module, _ConvNd):
        positions = _positions(output, module.out_channels)
    elif isinstance(module, nn.Linear):
        positions = _positions(first, module.in_features)
    elif isinstance(module, nn.Bilinear):
        positions = _positions(output, module.out_features)
    else:  # a linear layer of another library, see `prunable.FOREIGN_WEIGHTS`
        positions = _positions(first, weight.shape[0])
    yield "weight", weight, positions


def _positions(activation: Tensor, channels: int) -> int:
    return activation.numel() // max(channels, 1)


def _weights(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for attribute in default_weights(module):
        weight = getattr(module, attribute, None)
        # A lazy layer that no pass has reached has no weights yet.
        if weight is not None and not isinstance(weight, UninitializedParameter):
            yield _join(prefix, attribute), weight


def _join(prefix: str, attribute: str) -> str:
    return f"{prefix}.{attribute}" if prefix else attribute


def _call(model: nn.Module, example_input: Any) -> None:
    with torch.no_grad():
        if isinstance(example_input, Mapping):
            model(**example_input)
        elif isinstance(example_input, tuple | list):
            model(*example_input)
        else:
            model(example_input)


@contextmanager
def _plain_evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every module really called: no fused attention, no compiled code."""
    modes = [(module, module.training) for module in model.modules()]
    training = model.training
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        model.train(training)  # first, for modules that do more in `train` than set the flag
        for module, mode in modes:
            module.training = mode


def _per_sample(total: int, batch: int) -> int:
    return (total + batch // 2) // batch


def _batch_size(example_input: Any) -> int:
    tensor = _first_tensor(example_input)
    if tensor is None or tensor.dim() == 0 or tensor.shape[0] == 0:
        raise ConfigurationError(
            "example_input needs a tensor whose first dimension is a batch of at least one "
            "sample, alone or in a tuple (positional arguments) or dict (keyword arguments); "
            f"got {type(example_input).__name__ if tensor is None else tuple(tensor.shape)}."
        )
    return tensor.shape[0]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, Mapping | tuple | list):
        return None
    parts = value.values() if isinstance(value, Mapping) else value
    return next((t for t in map(_first_tensor, parts) if t is not None), None)

"""Multiply-adds (MACs) of a model, dense and sparse, per weight.

These layers are counted: convolutions, transposed convolutions, linear and bilinear layers, the
`Conv1D` of Transformers, and the projections of `MultiheadAttention`. Each weight makes one
multiply-add per position that it is applied to. A convolution counts every output position with the
whole kernel, border included, as published numbers do. A transposed convolution counts every input
position. A module that is called twice counts twice; tied weights count for each use.

Not counted are products of two activations (attention scores, and their products with values),
biases, norms, activation functions, pooling, embeddings and recurrent layers. Weights that a model
uses by functions, without the modules above, are not counted either.
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
from ..scripted import check_not_scripted
from ..weights.shards import count_nonzero, reshard


@dataclass(frozen=True)
class LayerFlops:
    """Multiply-adds of one weight tensor for one sample.

    Attributes:
        name: dotted name of the weight, such as ``"layer1.0.conv1.weight"``.
        kind: class of the module that uses it.
        dense: multiply-adds of all weights.
        sparse: multiply-adds of the nonzero weights.
        weight_shape: shape of the weight tensor.

    Example:
        >>> count_flops(nn.Linear(4, 2), torch.ones(1, 4)).layers[0]
        LayerFlops(name='weight', kind='Linear', dense=8, sparse=8, weight_shape=(2, 4))
    """

    name: str
    kind: str
    dense: int
    sparse: int
    weight_shape: tuple[int, ...]


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of a model for one sample.

    Attributes:
        layers: multiply-adds of each weight tensor, in the order of the model's modules.

    Example:
        >>> Flops([LayerFlops("0.weight", "Linear", dense=8, sparse=2, weight_shape=(2, 4))]).sparse
        2
    """

    layers: list[LayerFlops]

    @property
    def dense(self) -> int:
        """Multiply-adds of all weights, zeros included."""
        return sum(layer.dense for layer in self.layers)

    @property
    def sparse(self) -> int:
        """Multiply-adds of the nonzero weights."""
        return sum(layer.sparse for layer in self.layers)


def count_flops(model: nn.Module, example_input: Any) -> Flops:
    """Count the multiply-adds (MACs) of one forward pass, per sample.

    Runs the model once, in eval mode and without gradients, and restores its modes. The module
    docstring lists which layers are counted.

    Args:
        model: any module. Of wrappers of torch.compile and DistributedDataParallel, the module
            inside is run.
        example_input: a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments. Dimension 0 of the first tensor is the batch, by which counts are divided.
            They are rounded if the work of a layer is not per sample.

    Returns:
        Totals `.dense` and `.sparse`, and `.layers`. Layers that the pass did not reach have 0. On
        the meta device weights have no values, so sparse equals dense.

    Raises:
        ConfigurationError: there is no tensor in `example_input`, its batch is empty, the pass
            reached no layer that is counted, or a part of the model is TorchScript.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> _ = nn.init.zeros_(model.weight[0])
        >>> flops = count_flops(model, torch.ones(3, 4))
        >>> flops.dense, flops.sparse
        (8, 4)
    """
    batch = _batch_size(example_input)
    model = unwrap(model)
    check_not_scripted(model)
    counted: dict[str, nn.Module] = {
        name.replace("_orig_mod.", "").removesuffix("_orig_mod"): module
        for name, module in model.named_modules()
        if default_weights(module)
    }
    dense, sparse = _run(model, counted, example_input)
    if not any(dense.values()):
        raise ConfigurationError(
            f"{type(model).__name__} called no convolution, linear or attention module that has "
            "weights, so there is nothing to count."
        )
    with _plain_evaluation(model):  # in training mode, reading a weight may change a module
        weights = [
            (name, type(module).__name__, tuple(weight.shape))
            for prefix, module in counted.items()
            for name, weight in _weights(prefix, module)
        ]
    return Flops(
        [
            LayerFlops(
                name=name,
                kind=kind,
                dense=_per_sample(dense[name], batch),
                sparse=_per_sample(sparse[name], batch),
                weight_shape=shape,
            )
            for name, kind, shape in weights
        ]
    )


def _run(
    model: nn.Module, counted: Mapping[str, nn.Module], example_input: Any
) -> tuple[Counter[str], Counter[str]]:
    """Run the model; return dense and sparse multiply-adds of the batch, by name of the weight."""
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
    return dense, sparse


def _uses(
    module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> Iterator[tuple[str, Tensor, int]]:
    """Yield the weights that one call of a module used.

    Yields:
        Name of the weight in `module`, the weight, and the number of positions it was applied to.
    """
    if isinstance(module, nn.MultiheadAttention):
        # `out_proj` is applied as a function, so hooks on it are never called.
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
    else:  # a linear layer of another library (`prunable.FOREIGN_WEIGHTS`)
        positions = _positions(first, weight.shape[0])
    yield "weight", weight, positions


def _positions(activation: Tensor, channels: int) -> int:
    """Return the number of positions of an activation, those of all samples together."""
    return activation.numel() // max(channels, 1)


def _weights(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of the default weights of a module."""
    for attribute in default_weights(module):
        weight = getattr(module, attribute, None)
        # A lazy layer has no weights before the first pass that reaches it.
        if weight is not None and not isinstance(weight, UninitializedParameter):
            yield _join(prefix, attribute), weight


def _join(prefix: str, attribute: str) -> str:
    return f"{prefix}.{attribute}" if prefix else attribute


def _call(model: nn.Module, example_input: Any) -> None:
    """Run a forward pass without gradients."""
    with torch.no_grad():
        if isinstance(example_input, Mapping):
            model(**example_input)
        elif isinstance(example_input, tuple | list):
            model(*example_input)
        else:
            model(example_input)


@contextmanager
def _plain_evaluation(model: nn.Module) -> Iterator[None]:
    """Set eval mode, and let all modules be called: no fused attention, no compiled code."""
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
        model.train(training)  # first: `train` of some modules does more than set the flag
        for module, mode in modes:
            module.training = mode


def _per_sample(total: int, batch: int) -> int:
    """Return total / batch, rounded to the nearest integer, half up."""
    return (total + batch // 2) // batch


def _batch_size(example_input: Any) -> int:
    """Return dimension 0 of the first tensor; raise ConfigurationError if there is none."""
    tensor = _first_tensor(example_input)
    if tensor is None or tensor.dim() == 0 or tensor.shape[0] == 0:
        raise ConfigurationError(
            "example_input must contain a tensor whose dimension 0 is a batch of at least one "
            "sample. Pass the tensor, a tuple of positional arguments or a dict of keyword "
            "arguments. "
            f"Got {type(example_input).__name__ if tensor is None else tuple(tensor.shape)}."
        )
    return tensor.shape[0]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, Mapping | tuple | list):
        return None
    parts = value.values() if isinstance(value, Mapping) else value
    return next((t for t in map(_first_tensor, parts) if t is not None), None)

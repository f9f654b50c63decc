"""The parts of one engine step, for benchmarks that time them separately from training.

This file alone uses internals of the engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import torch_feather as feather
from torch_feather.weights.checksum import checksum
from torch_feather.weights.latent import copy_all

Calls = dict[str, Callable[[], object]]


def parameters(sparsifier: feather.Sparsifier) -> list[Tensor]:
    """Return the prunable parameters."""
    return list(sparsifier.step.training.binding.parameters)


def latent_weights(sparsifier: feather.Sparsifier) -> list[Tensor]:
    """Return the flat latent weights on this process."""
    return list(sparsifier.step.training.weights.flats)


def step(sparsifier: feather.Sparsifier) -> None:
    """Run the engine's part of a step of the only optimizer."""
    (one,) = sparsifier.step.optimizers
    sparsifier.step.before(one, closure=False)
    sparsifier.step.after(one)


def step_calls(sparsifier: feather.Sparsifier) -> Calls:
    """Return what the engine does before and after the optimizer, and with gradients."""
    engine = sparsifier.step
    (one,) = engine.optimizers
    hooks = [
        (hook, torch.randn_like(p))
        for p in parameters(sparsifier)
        for hook in (p._backward_hooks or {}).values()
    ]
    return {
        "before": lambda: engine.before(one, closure=False),
        "after": lambda: engine.after(one),
        "pull_back": lambda: [hook(gradient) for hook, gradient in hooks],
    }


def step_parts(sparsifier: feather.Sparsifier, step_count: Tensor | None = None) -> Calls:
    """Return the computations within `after`, by name.

    Args:
        sparsifier: the sparsifier.
        step_count: step of the thresholds; None for the current one.
    """
    training = sparsifier.step.training
    count = training.count if step_count is None else step_count
    spare = [torch.empty_like(view) for view in training.weights.views]
    return {
        "threshold": lambda: training.method.update(training.weights, count),
        "effective_weights": lambda: training.method.write_effective(
            training.weights, training.pruning, spare
        ),
    }


def copy_parts(sparsifier: feather.Sparsifier) -> Calls:
    """Return the copies and checks within a step, by name; allocates two copies of the weights."""
    effective = [p.detach().clone() for p in parameters(sparsifier)]
    spare = [torch.empty_like(values) for values in effective]
    # A copy into the parameters would count as an external write.
    parts: Calls = {"copy": lambda: copy_all(spare, effective)}
    if effective[0].device.type == "cpu":
        parts["checks"] = lambda: [checksum(p) for p in parameters(sparsifier)]
    return parts


def method_bytes(sparsifier: feather.Sparsifier) -> int:
    """Return the bytes that the method keeps between steps in addition to the latent weights."""
    training = sparsifier.step.training
    training.forget_own_gradients()  # the next step has new ones
    return sum(storages([vars(training.method), training.pruning]).values())


def storages(held: object) -> dict[int, int]:
    """Return address and bytes of each storage used by tensors in nested containers."""
    if isinstance(held, Tensor):
        storage = held.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if hasattr(held, "tensors"):
        held = held.tensors()
    parts = list(held.values()) if isinstance(held, dict) else held
    if not isinstance(parts, list | tuple):
        return {}
    return {address: size for part in parts for address, size in storages(part).items()}

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
    return [slot.parameter for slot in sparsifier.slots]


def latent_weights(sparsifier: feather.Sparsifier) -> list[Tensor]:
    """Return the flat latent weights on this process."""
    return list(sparsifier.weights.flats)


def step(sparsifier: feather.Sparsifier) -> None:
    """Run the engine's part of an optimizer step."""
    every = range(len(sparsifier.slots))
    sparsifier.before_step(every)
    sparsifier.capture(every)
    sparsifier.after_step(True)


def step_calls(sparsifier: feather.Sparsifier) -> Calls:
    """Return the calls that make up a step, by name."""
    every = range(len(sparsifier.slots))
    hooks = [
        (hook, torch.randn_like(p))
        for p in parameters(sparsifier)
        for hook in (p._backward_hooks or {}).values()
    ]
    return {
        "complete": lambda: sparsifier.complete_at_step(None),
        "before_step": lambda: sparsifier.before_step(every),
        "capture": lambda: sparsifier.capture(every),
        "after_step": lambda: sparsifier.after_step(True),
        "pull_back": lambda: [hook(gradient) for hook, gradient in hooks],
    }


def step_parts(sparsifier: feather.Sparsifier, step_count: Tensor | None = None) -> Calls:
    """Return the computations within a step, by name.

    Args:
        sparsifier: the sparsifier.
        step_count: step of the thresholds; None for the current one.
    """
    weights, method = sparsifier.weights, sparsifier.reparametrization
    if step_count is None:
        step_count = torch.tensor(sparsifier.step_count, device=weights.flats[0].device)
    return {
        "threshold": lambda: method.refresh(weights, step_count),
        "effective_weights": lambda: method.images(weights),
    }


def copy_parts(sparsifier: feather.Sparsifier) -> Calls:
    """Return the copies and checks within a step, by name; allocates two copies of the weights."""
    effective, _ = sparsifier.reparametrization.images(sparsifier.weights)
    spare = [torch.empty_like(values) for values in effective]
    # A copy into the parameters would count as an external write.
    parts: Calls = {"copy": lambda: copy_all(spare, effective)}
    if effective[0].device.type == "cpu":
        parts["checks"] = lambda: [checksum(p) for p in parameters(sparsifier)]
    return parts


def method_bytes(sparsifier: feather.Sparsifier) -> int:
    """Return the bytes that the method keeps between steps in addition to the latent weights."""
    sparsifier.reparametrization.forget_gradients()  # the next step has new ones
    return sum(storages(vars(sparsifier.reparametrization)).values())


def storages(held: object) -> dict[int, int]:
    """Return address and bytes of each storage used by tensors in nested containers."""
    if isinstance(held, Tensor):
        storage = held.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    parts = list(held.values()) if isinstance(held, dict) else held
    if not isinstance(parts, list | tuple):
        return {}
    return {address: size for part in parts for address, size in storages(part).items()}

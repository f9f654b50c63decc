"""Optimizers inside wrappers, and optimizers that are not supported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

from ..errors import ConfigurationError

# Optimizers that write parameters outside of step(), when these hold effective weights.
WRITE_OUTSIDE_STEP = ("ScheduleFree", "Lookahead")
_MASTER_COPIES = (
    "trains copies of the weights in another precision, so the model's own weights cannot be "
    "exchanged in its step. Train with autocast and a plain optimizer"
)
# Optimizers that are not supported: the reason, and an alternative.
UNSUPPORTED = {
    "ZeroRedundancyOptimizer": "has a state dict of its own, without latent weights. Use "
    "fully_shard with a plain optimizer, which shards the optimizer's state and the latent weights",
    "CPUOffloadOptimizer": "trains copies of the weights. Use fully_shard with CPUOffloadPolicy "
    "and a plain optimizer, which keeps weights, latent weights and state on the CPU",
    "LOMO": "writes parameters in the backward pass, without step(). Use a plain optimizer for "
    "each parameter, and step it in a hook (register_post_accumulate_grad_hook)",
    "SafeFP16Optimizer": _MASTER_COPIES,
    "FP16_Optimizer": _MASTER_COPIES,
}
UNSUPPORTED["AdaLOMO"] = UNSUPPORTED["LOMO"]
# The optimizers of DeepSpeed's engine; those in deepspeed.ops are plain optimizers.
_DEEPSPEED = frozenset(
    ["DeepSpeedOptimizer", "ZeROOptimizer", "DeepSpeedZeroOptimizer", "BF16_Optimizer",
     "DeepSpeedZeroOptimizer_Stage3", "FP16_UnfusedOptimizer"]
)  # fmt: skip
_NO_DEEPSPEED = (
    "{} is not supported: this optimizer of DeepSpeed trains flat copies of the weights, which "
    "are partitioned over the processes and written back to the model, and no latent weights "
    "could be exchanged. Use fully_shard (FSDP2) with a plain optimizer, which shards weights, "
    "latent weights and the optimizer's state; or DistributedDataParallel."
)
# Packages with optimizers of their own that are no torch.optim.Optimizer, and what to use there.
_OTHER_OPTIMIZERS = {
    "keras": "Keras' optimizers are not supported. Create a torch.optim optimizer, and step it in "
    "train_step of the model: see Keras in docs/integrations.md.",
    "fastai": "To train with an optimizer of PyTorch, pass opt_func=partial(OptimWrapper, "
    "opt=torch.optim.AdamW) to the Learner, and its opt to sparsify: see fastai in "
    "docs/integrations.md.",
}
# Packages whose wrappers only decide when to step: hooks belong on the optimizer inside.
_FRAMEWORKS = frozenset(
    ["accelerate", "fastai", "lightning", "lightning_fabric", "opacus", "pytorch_lightning"]
)
# Attributes that hold a wrapped optimizer, if it is not in the wrapper's `__dict__`.
_ATTRIBUTES = ("optimizer", "_optimizer", "opt", "optim", "base_optimizer", "original_optimizer")


def levels_of(optimizer: Any) -> list[Any]:
    """Return an optimizer and those that it wraps, the innermost last.

    Wrappers of frameworks (Accelerate, fastai, Lightning, Opacus), and objects that are no
    optimizers but hold one, are left out. They step the optimizer inside, or skip its step.

    Args:
        optimizer: an optimizer or a wrapper.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> class Wrapper:
        ...     def __init__(self, optimizer):
        ...         self.opt = optimizer
        >>> levels_of(Wrapper(optimizer)) == [optimizer]
        True
    """
    levels = _all_levels(optimizer)
    while len(levels) > 1 and not _acts(levels[0]):
        del levels[0]
    return levels


def _all_levels(optimizer: Any) -> list[Any]:
    levels = [optimizer]
    while (inner := _inside(levels[-1])) is not None:
        if any(inner is level for level in levels):
            break
        levels.append(inner)
    return levels


def plain_optimizer(optimizer: Any) -> Any:
    """Return the innermost optimizer of wrappers such as those of Accelerate and Lightning.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> plain_optimizer(optimizer) is optimizer
        True
    """
    return levels_of(optimizer)[-1]


def has_step_hooks(optimizer: Any) -> bool:
    """Return whether the hooks of `torch.optim` are called around an optimizer's own step.

    Not so for wrappers that never call `Optimizer.__init__`, even if they pass on its attributes.

    Example:
        >>> import torch
        >>> has_step_hooks(torch.optim.SGD([torch.ones(2)], lr=0.1))
        True
    """
    own = getattr(optimizer, "__dict__", {})
    return "_optimizer_step_pre_hooks" in own and hasattr(type(optimizer).step, "hooked")


def checked(optimizer: Any) -> Any:
    """Return the optimizer to attach to, inside wrappers of frameworks.

    Raises:
        ConfigurationError: it is not an optimizer, or it is not supported.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> checked(optimizer) is optimizer
        True
    """
    for kind in (kind for level in _all_levels(optimizer) for kind in type(level).__mro__):
        _refuse(kind)
    levels = levels_of(optimizer)
    if not isinstance(levels[-1], Optimizer):
        packages = (kind.__module__.split(".")[0] for kind in type(optimizer).__mro__)
        advice = [_OTHER_OPTIMIZERS[name] for name in packages if name in _OTHER_OPTIMIZERS]
        raise ConfigurationError(
            "optimizer must be a torch.optim.Optimizer or a sequence of them, got "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}. "
            f"{[*advice, 'If it wraps optimizers, pass these.'][0]}"
        )
    for level in levels:
        if not hasattr(level, "__dict__"):
            raise ConfigurationError(
                f"{type(level).__name__} has no __dict__, so its step cannot be observed. Pass the "
                "optimizer that it wraps."
            )
    if not isinstance(getattr(levels[0], "state", None), Mapping):
        raise ConfigurationError(
            f"{type(levels[0]).__name__} has no state by parameter, as a wrapper of several "
            "optimizers. Pass the optimizers that it wraps to sparsify, in the order in which they "
            "step."
        )
    return levels[0]


def _refuse(kind: type) -> None:
    """Raise ConfigurationError if a class is not supported."""
    for unsupported in WRITE_OUTSIDE_STEP:
        if unsupported in kind.__name__:
            raise ConfigurationError(
                f"{kind.__name__} writes parameters outside of step(), where they hold effective "
                "weights instead of latent ones. Use a plain optimizer; for averaged weights use "
                "torch_feather.LatentAverage."
            )
    if kind.__name__ in _DEEPSPEED or kind.__module__.startswith("deepspeed.runtime."):
        raise ConfigurationError(_NO_DEEPSPEED.format(kind.__name__))
    if kind.__name__ in UNSUPPORTED:
        raise ConfigurationError(
            f"{kind.__name__} is not supported: it {UNSUPPORTED[kind.__name__]}."
        )


def _acts(optimizer: Any) -> bool:
    """Return whether a wrapper may compute in `step`, and so needs latent weights there."""
    if not _is_optimizer(optimizer):
        return False
    return all(kind.__module__.split(".")[0] not in _FRAMEWORKS for kind in type(optimizer).__mro__)


def _inside(wrapper: Any) -> Any | None:
    """Return the optimizer that a wrapper holds for the same parameters; None without one."""
    own = _parameters(wrapper)
    for held in _held(wrapper):
        if held is not wrapper and _is_optimizer(held) and (not own or own & _parameters(held)):
            return held
    return None


def _held(wrapper: Any) -> Iterator[Any]:
    # First what the object itself holds: `__getattr__` may answer for an optimizer deeper inside.
    yield from list(getattr(wrapper, "__dict__", {}).values())
    for name in _ATTRIBUTES:
        held = getattr(wrapper, name, None)
        if held is not None:
            yield held


def _is_optimizer(value: Any) -> bool:
    return (
        not isinstance(value, type)
        and callable(getattr(value, "step", None))
        and isinstance(getattr(value, "param_groups", None), list)
    )


def _parameters(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        return set()
    return {id(p) for group in groups for p in group.get("params", ())}

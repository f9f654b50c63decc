"""Hooks, closures and wrapped calls of one optimizer; independent of sparsity."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import devices
from ..errors import StateError
from ..weights.shards import count_nonzero

# Message of torch.compile(fullgraph=True), which cannot skip the hooks.
_NOT_COMPILED = (
    "sparse training exchanges weights around optimizer.step: compile forward pass and loss with "
    "fullgraph=True, and the optimizer's step without it"
)


@dataclass(frozen=True)
class Handlers:
    """Functions that are called around the steps of one optimizer.

    Attributes:
        before: called before a step, once even if subclasses nest steps; its argument is whether
            there is a closure.
        after: called after a step.
        closure: returns a context that is entered around every call of the closure.
        failed: called after a step that raised.
        save: returns the state dict that is saved.
        load: loads a state dict, given the optimizer's own `load_state_dict`.

    Example:
        >>> from contextlib import nullcontext
        >>> handlers = Handlers(
        ...     before=lambda closure: print("before, with closure" if closure else "before"),
        ...     after=lambda: print("after"),
        ...     closure=nullcontext,
        ...     failed=lambda: print("failed"),
        ...     save=lambda state: state,
        ...     load=lambda load, state: load(state),
        ... )
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> hooks = OptimizerHooks(optimizer, handlers)
        >>> optimizer.step(lambda: 0.0)
        before, with closure
        after
        0.0
    """

    before: Callable[[bool], None]
    after: Callable[[], None]
    closure: Callable[[], AbstractContextManager[Any]]
    failed: Callable[[], None]
    save: Callable[[dict[str, Any]], dict[str, Any]]
    load: Callable[[Callable[..., Any], dict[str, Any]], Any]


class OptimizerHooks:
    """Calls handlers around the steps and state dicts of one optimizer.

    Public hooks are used if they exist. `step` and `load_state_dict` of this one optimizer are
    overridden too. For no hook runs after a step that raised, and a subclass may override
    `load_state_dict` without calling hooks.

    Args:
        optimizer: the optimizer.
        handlers: the functions to call.

    Example:
        >>> from contextlib import nullcontext
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> handlers = Handlers(
        ...     before=lambda closure: print("before"),
        ...     after=lambda: print("after"),
        ...     closure=nullcontext,
        ...     failed=lambda: None,
        ...     save=lambda state: state,
        ...     load=lambda load, state: load(state),
        ... )
        >>> hooks = OptimizerHooks(optimizer, handlers)
        >>> optimizer.step()
        before
        after
    """

    def __init__(self, optimizer: Optimizer, handlers: Handlers):
        self.optimizer, self._do = optimizer, handlers
        self._depth = 0  # subclasses that call super().step() run the hooks once per level
        self._attached = True
        before, after = (
            torch.compiler.disable(hook, reason=_NOT_COMPILED)
            for hook in (self._before, self._after)
        )
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
            optimizer.register_state_dict_post_hook(lambda _, state: handlers.save(state)),
        ]
        self._wrapped: dict[str, Any] = {}
        self._wrap("step", self._guarded)
        self._wrap("load_state_dict", self._loaded)
        for phase in ("first_step", "second_step"):  # SAM and similar optimizers
            if hasattr(optimizer, phase):
                self._wrap(phase, functools.partial(self._only_inside_step, phase))

    def release(self) -> None:
        """Remove every hook and override."""
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, (wrapper, before) in self._wrapped.items():
            if self.optimizer.__dict__.get(name) is wrapper:
                del self.optimizer.__dict__[name]
                if before is not None:
                    self.optimizer.__dict__[name] = before
        # A learning-rate scheduler may hold our `step` for ever: it must not hold the model too.
        del self._do

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._depth += 1
        if self._depth > 1:
            return None
        positional = len(args) > 1 and callable(args[1])
        keyword = callable(kwargs.get("closure"))
        self._do.before(positional or keyword)
        if positional:
            return (args[0], self._around(args[1]), *args[2:]), kwargs
        if keyword:
            return args, {**kwargs, "closure": self._around(kwargs["closure"])}
        return None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._do.after()

    def _around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return the closure inside the context of the handlers."""

        @functools.wraps(closure)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._do.closure():
                return closure(*args, **kwargs)

        return wrapped

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        """Replace a method of this one optimizer by `around(method, *args, **kwargs)`."""
        inner = getattr(self.optimizer, name)

        @functools.wraps(getattr(inner, "__func__", inner))
        def method(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs) if self._attached else inner(*args, **kwargs)

        wrapper = types.MethodType(method, self.optimizer)
        self._wrapped[name] = wrapper, self.optimizer.__dict__.get(name)
        self.optimizer.__dict__[name] = wrapper

    def _guarded(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Step; call the handler `failed` if it raises."""
        try:
            return step(*args, **kwargs)
        except BaseException:
            if self._attached:
                self._depth = 0
                self._do.failed()
            raise

    def _loaded(self, load_state_dict: Callable[..., Any], state_dict: dict[str, Any]) -> Any:
        return self._do.load(load_state_dict, state_dict)

    def _only_inside_step(
        self, phase: str, inner: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        """Call a phase of a step, or raise StateError outside of `step`."""
        if self._depth == 0:
            raise StateError(
                f"{type(self.optimizer).__name__}.{phase}() writes parameters outside of step(), "
                "where they hold effective weights. Call optimizer.step(closure) instead."
            )
        return inner(*args, **kw)


def only_initializes(optimizer: Optimizer) -> bool:
    """Return whether the next step only initializes the optimizer's state, and must not count.

    torch.distributed.checkpoint makes such a step, with lr 0 on zero gradients.

    Args:
        optimizer: before its step.

    Example:
        >>> only_initializes(torch.optim.SGD([torch.ones(2)], lr=0.0))
        True
    """
    if optimizer.state:
        return False
    groups = optimizer.param_groups
    rates = [group.get("lr", 1) for group in groups]
    # That lr 0 is not on an accelerator; reading one there would synchronize the host.
    on_device = [isinstance(lr, Tensor) and devices.synchronizes(lr.device) for lr in rates]
    if any(device or lr != 0 for device, lr in zip(on_device, rates, strict=True)):
        return False
    gradients = (p.grad for group in groups for p in group["params"])
    return not any(g is not None and count_nonzero(g) for g in gradients)

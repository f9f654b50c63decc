"""Hooks, closures and wrapped calls of one optimizer; independent of sparsity."""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import devices
from ..errors import StateError
from ..weights.shards import count_nonzero
from .copies import forget_copy, mark_copy
from .wrappers import has_step_hooks

# Message of torch.compile(fullgraph=True), which cannot skip the hooks.
_NOT_COMPILED = (
    "sparse training exchanges weights around optimizer.step: compile forward pass and loss with "
    "fullgraph=True, and the optimizer's step without it"
)


@dataclass(frozen=True)
class Handlers:
    """Functions that are called around the steps of one optimizer.

    Attributes:
        before: called before a step, once even if subclasses nest steps. Its arguments: whether
            there is a closure, and whether the gradients are ready, unless a closure computes them.
        ready: called within a step whose gradients were not ready before it, when they are.
        after: called after a step; its argument is whether the step was taken.
        closure: returns a context that is entered around every call of the closure.
        failed: called after a step that raised.
        save: returns the state dict that is saved.
        load: loads a state dict, given the optimizer's own `load_state_dict`.
        entries: returns the entries to add to the live state of a copy, by parameter.

    Example:
        >>> from contextlib import nullcontext
        >>> handlers = Handlers(
        ...     before=lambda closure, ready: print("before, closure:", closure),
        ...     ready=lambda: None,
        ...     after=lambda taken: print("after"),
        ...     closure=nullcontext,
        ...     failed=lambda: print("failed"),
        ...     save=lambda state: state,
        ...     load=lambda load, state: load(state),
        ...     entries=dict,
        ... )
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> hooks = OptimizerHooks([optimizer], handlers)
        >>> optimizer.step(lambda: 0.0)
        before, closure: True
        after
        0.0
    """

    before: Callable[[bool, bool], None]
    ready: Callable[[], None]
    after: Callable[[bool], None]
    closure: Callable[[], AbstractContextManager[Any]]
    failed: Callable[[], None]
    save: Callable[[dict[str, Any]], dict[str, Any]]
    load: Callable[[Callable[..., Any], dict[str, Any]], Any]
    entries: Callable[[], Mapping[Tensor, Mapping[str, Any]]]


class OptimizerHooks:
    """Calls handlers around the steps and state dicts of one optimizer and those that it wraps.

    Public hooks are used if they exist. `step` and `load_state_dict` of these objects are
    overridden too. For no hook runs after a step that raised, a subclass may override
    `load_state_dict` without calling hooks, and wrappers that never call `Optimizer.__init__` have
    no hooks. Steps and states nest: only the outermost call counts.

    Args:
        levels: the optimizer, and the optimizers inside it, see `wrappers.levels_of`.
        handlers: the functions to call.

    Example:
        >>> from contextlib import nullcontext
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> handlers = Handlers(
        ...     before=lambda closure, ready: print("before"),
        ...     ready=lambda: None,
        ...     after=lambda taken: print("after"),
        ...     closure=nullcontext,
        ...     failed=lambda: None,
        ...     save=lambda state: state,
        ...     load=lambda load, state: load(state),
        ...     entries=dict,
        ... )
        >>> hooks = OptimizerHooks([optimizer], handlers)
        >>> optimizer.step()
        before
        after
    """

    def __init__(self, levels: Sequence[Any], handlers: Handlers):
        self.levels, self._do = list(levels), handlers
        # A wrapper without hooks of its own may skip the step of the optimizer inside.
        self._may_skip = len(self.levels) > 1 and not has_step_hooks(self.levels[0])
        self._depth = 0  # subclasses that call super().step() run the hooks once per level
        self._taken, self._loads, self._saves, self._loading = False, 0, 0, False
        self._attached = True
        self._before_hook, self._after_hook = (
            torch.compiler.disable(hook, reason=_NOT_COMPILED)
            for hook in (self._before, self._after)
        )
        self._handles: list[Any] = []
        self._wrapped: list[tuple[Any, str, Any, Any]] = []
        for level in self.levels:
            self._attach(level)

    @property
    def stepping(self) -> bool:
        """Whether a step of the optimizer runs now."""
        return self._depth > 0

    def _attach(self, level: Any) -> None:
        forget_copy(level)
        hooked = has_step_hooks(level)
        if hooked:
            self._handles += [
                level.register_step_pre_hook(self._before_hook),
                level.register_step_post_hook(self._after_hook),
            ]
        self._wrap(level, "step", functools.partial(self._guarded, level, hooked))
        if "_optimizer_state_dict_post_hooks" in level.__dict__:
            hook = level.register_state_dict_post_hook(lambda _, state: self._save(state))
            self._handles.append(hook)
        else:
            self._wrap(level, "state_dict", functools.partial(self._saved, level))
        self._wrap(level, "load_state_dict", functools.partial(self._loaded, level))
        if hasattr(level, "__getstate__"):
            self._wrap(level, "__getstate__", functools.partial(self._copied, level))
        for phase in ("first_step", "second_step"):  # SAM and similar optimizers
            if hasattr(level, phase):
                self._wrap(level, phase, functools.partial(self._only_inside_step, level, phase))
        self._wrap(level, "set_closure", functools.partial(_no_own_closure, level))  # GSAM

    def release(self) -> None:
        """Remove every hook and override."""
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for level, name, wrapper, before in self._wrapped:
            if level.__dict__.get(name) is wrapper:
                del level.__dict__[name]
                if before is not None:
                    level.__dict__[name] = before
        # A learning-rate scheduler may hold our `step` for ever: it must not hold the model too.
        del self._do, self.levels, self._wrapped

    def _wrap(self, level: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace a method of this one object by `around(method, *args, **kwargs)`."""
        if not hasattr(level, name):
            return
        inner = getattr(level, name)

        @functools.wraps(getattr(inner, "__func__", inner))
        def method(_: Any, *args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs) if self._attached else inner(*args, **kwargs)

        wrapper = types.MethodType(method, level)
        self._wrapped.append((level, name, wrapper, level.__dict__.get(name)))
        level.__dict__[name] = wrapper

    # Steps

    def _before(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._depth += 1
        innermost = optimizer is self.levels[-1]
        if self._depth > 1:
            if self._may_skip and innermost:
                self._do.ready()
            return None
        self._taken = not self._may_skip
        positional = len(args) > 1 and callable(args[1])
        keyword = callable(kwargs.get("closure"))
        self._do.before(positional or keyword, innermost or not self._may_skip)
        if positional:
            return (args[0], self._around(args[1]), *args[2:]), kwargs
        if keyword:
            return args, {**kwargs, "closure": self._around(kwargs["closure"])}
        return None

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        self._taken |= optimizer is self.levels[-1]
        if self._depth == 0:
            self._do.after(self._taken)

    def _around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return the closure inside the context of the handlers."""

        @functools.wraps(closure)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._do.closure():
                return closure(*args, **kwargs)

        return wrapped

    def _guarded(
        self, level: Any, hooked: bool, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Step; call the handler `failed` if the outermost step raises."""
        depth = self._depth
        try:
            if hooked:
                if self._before_hook not in level._optimizer_step_pre_hooks.values():
                    raise _no_hooks(level)
                return step(*args, **kwargs)
            changed = self._before_hook(level, (level, *args), kwargs)
            if changed is not None:
                (_, *args), kwargs = changed
            result = step(*args, **kwargs)
            self._after_hook(level, args, kwargs)
            return result
        except BaseException as error:
            if self._attached:
                self._depth = depth
                if depth == 0:
                    self._do.failed()
                    if _differentiates(level, error):
                        raise _no_graph(level) from error
            raise

    def _only_inside_step(
        self, level: Any, phase: str, inner: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        """Call a phase of a step, or raise StateError outside of `step`."""
        if self._depth == 0:
            raise StateError(
                f"{type(level).__name__}.{phase}() writes parameters outside of step(), "
                "where they hold effective weights. Call optimizer.step(closure) instead."
            )
        return inner(*args, **kw)

    # State dicts and copies

    def _save(self, state: dict[str, Any]) -> dict[str, Any]:
        self._saves += 1
        return self._do.save(state)

    def _saved(self, level: Any, state_dict: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the state dict of a wrapper: what the optimizer inside added is kept."""
        before = self._saves
        state = state_dict(*args, **kwargs)
        if self._saves > before:
            return state
        if not _is_standard(state):
            raise _no_state_dict(level)
        return self._save(state)

    def _loaded(
        self,
        level: Any,
        load_state_dict: Callable[..., Any],
        state_dict: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        if self._loading:
            return load_state_dict(state_dict, *args, **kw)
        if not _is_standard(state_dict):
            before = self._loads
            result = load_state_dict(state_dict, *args, **kw)
            if self._loads == before:
                raise _no_state_dict(level)
            return result
        self._loads += 1
        self._loading = True
        try:
            return self._do.load(lambda state: load_state_dict(state, *args, **kw), state_dict)
        finally:
            self._loading = False

    def _copied(self, level: Any, getstate: Callable[..., Any]) -> Any:
        """Return what pickle and copy take: latent weights, and a step that raises."""
        found = getstate()
        state, *slots = found if isinstance(found, tuple) else (found,)
        if not isinstance(state, dict):
            return found
        own = {name: wrapper for at, name, wrapper, _ in self._wrapped if at is level}
        state = {name: value for name, value in state.items() if value is not own.get(name, _NONE)}
        live = getattr(self.levels[0], "state", None)
        if live is not None and state.get("state") is live:
            state["state"] = _with(state["state"], self._do.entries())
        mark_copy(level, state)
        return (state, *slots) if slots else state


_NONE = object()


def _with(state: Any, entries: Mapping[Tensor, Mapping[str, Any]]) -> Any:
    """Return a copy of a live state with added entries."""
    joined = defaultdict(dict, state)
    for parameter, own in entries.items():
        joined[parameter] = {**joined[parameter], **own}
    return joined


def _is_standard(state: Any) -> bool:
    """Return whether a state dict has the format of `torch.optim`."""
    return isinstance(state, dict) and {"state", "param_groups"} <= state.keys()


def _no_state_dict(level: Any) -> StateError:
    return StateError(
        f"The state dict of {type(level).__name__} does not have the format of torch.optim, so it "
        "cannot hold latent weights. Pass the optimizers that it wraps to sparsify, and save and "
        "load their state dicts."
    )


def _no_hooks(level: Any) -> StateError:
    return StateError(
        f"The step hooks of this {type(level).__name__} were removed, as by another call of its "
        "__init__, so it would train effective weights instead of latent ones. To begin with a new "
        "optimizer: state = sparsifier.state_dict(); sparsifier.detach(); create the optimizer; "
        "call sparsify again with the same arguments; sparsifier.load_state_dict(state)."
    )


def _no_own_closure(level: Any, *_: Any, **__: Any) -> NoReturn:
    raise StateError(
        f"After {type(level).__name__}.set_closure(), step() evaluates the model where the "
        "parameters hold latent weights. Pass the closure to the step: optimizer.step(closure)."
    )


def _differentiates(level: Any, error: BaseException) -> bool:
    """Return whether a step failed because it differentiates gradients again."""
    if not isinstance(error, RuntimeError) or "modified by an inplace operation" not in str(error):
        return False
    gradients = (p.grad for group in level.param_groups for p in group["params"])
    return any(g is not None and g.requires_grad for g in gradients)


def _no_graph(level: Any) -> StateError:
    return StateError(
        f"{type(level).__name__} differentiates the gradients inside step(), where the parameters "
        "hold latent weights: the graph of the gradients belongs to the effective weights. Compute "
        "second derivatives before step(), outside of the optimizer, or use an optimizer that "
        "needs only gradients. The weights are unchanged."
    )


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

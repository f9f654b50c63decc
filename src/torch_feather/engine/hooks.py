"""The side of the engine that faces the optimizer: its hooks, closures and state dict.

Nothing here knows what sparse means. An attachment tells the sparsifier when a step of its
optimizer begins and ends, and carries latent weights through the optimizer's state dict.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import devices
from ..errors import StateError, some, warn
from ..prunable import find_prunable
from ..weights.latent import copy_all
from ..weights.shards import count_nonzero, local
from .binding import Slot, attached
from .checkpoint import Header
from .step_in_backward import in_backward

if TYPE_CHECKING:
    from ..sparsifier import Sparsifier

# Of the keys of our entries in the optimizer's state dict, beside its own of each parameter.
PREFIX = "feather_"

# What torch.compile says of the hooks where it must not leave anything out.
_NOT_COMPILED = (
    "around optimizer.step the weights of sparse training are exchanged: compile forward pass and "
    "loss with fullgraph=True, and the optimizer's step without it"
)


class Attachment:
    """Hooks on one optimizer.

    Args:
        sparsifier: told of every step.
        optimizer: the optimizer.
        indices: which of the sparsifier's slots this optimizer holds.
        last: whether the schedule advances when this optimizer has stepped.
    """

    def __init__(
        self, sparsifier: Sparsifier, optimizer: Optimizer, indices: list[int], last: bool
    ):
        self.sparsifier = sparsifier
        self.optimizer = optimizer
        self.indices = indices
        self.last = last
        self._depth = 0  # subclasses that call super().step() fire the hooks once per level
        self._latent = False  # whether the parameters hold latent weights right now
        self._phantom = False
        self._in_round = False  # whether this step is one of several within a backward pass
        self._images: list[Tensor] = []  # and what its parameters held before it
        self._groups = len(optimizer.param_groups)
        self._attached = True
        before, after = (
            torch.compiler.disable(hook, reason=_NOT_COMPILED)
            for hook in (self._before, self._after)
        )
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
            optimizer.register_state_dict_post_hook(self._save),
        ]
        self._wrapped: dict[str, Any] = {}
        self._wrap("step", self._guarded)
        self._wrap("load_state_dict", self._load)
        for phase in ("first_step", "second_step"):  # SAM and its kin
            if hasattr(optimizer, phase):
                self._wrap(phase, functools.partial(self._only_inside_step, phase))
        for one in (optimizer, *self._weights()):
            attached[one] = True

    def parameter_at(self, slot: Slot) -> nn.Parameter:
        """What the optimizer holds now where it held the slot's parameter."""
        try:
            return self.optimizer.param_groups[slot.group]["params"][slot.position]
        except IndexError:
            raise StateError(
                f"The optimizer no longer holds {slot.name}: a parameter group was taken out. "
                "Detach the sparsifier before that, and make a new one after it."
            ) from None

    @property
    def in_step(self) -> bool:
        """Whether the parameters hold latent weights right now."""
        return self._latent

    def release(self) -> None:
        """Removes every hook."""
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, (ours, before) in self._wrapped.items():
            if self.optimizer.__dict__.get(name) is ours:
                del self.optimizer.__dict__[name]
                if before is not None:
                    self.optimizer.__dict__[name] = before
        for one in (self.optimizer, *self._weights()):
            attached.pop(one, None)

    def _weights(self) -> list[nn.Parameter]:
        return [self.sparsifier.slots[i].parameter for i in self.indices]

    # Steps

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._depth += 1
        if self._depth > 1:
            return None
        self._warn_of_new_groups()
        self._phantom = self._is_phantom()
        positional = len(args) > 1 and callable(args[1])
        keyword = callable(kwargs.get("closure"))
        self._in_round = self.sparsifier.round.is_open or in_backward()
        if self._in_round:
            self._enter_round(positional or keyword)
            return None
        if not (positional or keyword):
            self.sparsifier.complete_at_step(optimizer)
        self.sparsifier.before_step(self.indices)
        self._latent = True
        if positional:
            return (args[0], self._sparse(args[1]), *args[2:]), kwargs
        if keyword:
            return args, {**kwargs, "closure": self._sparse(kwargs["closure"])}
        return None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        if self._in_round:
            self._leave_round()
            return
        self.sparsifier.capture(self.indices)
        self._latent = False
        # A fused optimizer under GradScaler decides on the device whether it steps.
        skipped = getattr(optimizer, "found_inf", None)
        taken = not self._phantom if skipped is None else skipped == 0
        self.sparsifier.after_step(taken if self.last else False)

    def _enter_round(self, closure: bool) -> None:
        """Parameters become latent within a backward pass, see `rounds.py`."""
        if not self.indices:
            return
        needs = "Step after the backward pass: this optimizer steps within it, and "
        if self.sparsifier.reparametrization.completes:
            raise StateError(needs + "the method needs the gradients of all weights at once.")
        if closure or getattr(self.optimizer, "found_inf", None) is not None:
            raise StateError(needs + "neither closures nor GradScaler are handled there.")
        if isinstance(self.sparsifier.model, nn.parallel.DistributedDataParallel):
            raise StateError(needs + "DistributedDataParallel has not averaged the gradients yet.")
        self.sparsifier.enter_round(self)
        self._images = [local(parameter).detach().clone() for parameter in self._weights()]
        self.sparsifier.show_latent(self.indices)
        self._latent = True

    def _leave_round(self) -> None:
        if not self.indices:
            return
        self.sparsifier.capture(self.indices)
        self._latent = False
        with torch.no_grad():
            copy_all(list(map(local, self._weights())), self._images)
        self._images = []
        self.sparsifier.leave_round(self)

    def _sparse(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure as the network must see it: with the sparse image in the parameters."""

        @functools.wraps(closure)
        def on_image(*args: Any, **kwargs: Any) -> Any:
            self.sparsifier.capture(self.indices)
            self._latent = False
            self.sparsifier.show_image()
            try:
                result = closure(*args, **kwargs)
                self.sparsifier.complete_at_step(self.optimizer)
                return result
            finally:
                self.sparsifier.show_latent(self.indices)
                self._latent = True

        return on_image

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        """Replaces a method of this one optimizer by `around(method, *args, **kwargs)`.

        For what the public hooks leave open: no post-hook runs after a step that raised, and an
        overridden `load_state_dict` may read the given state without asking any hook.
        """
        inner = getattr(self.optimizer, name)

        @functools.wraps(getattr(inner, "__func__", inner))
        def method(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs) if self._attached else inner(*args, **kwargs)

        ours = types.MethodType(method, self.optimizer)
        self._wrapped[name] = ours, self.optimizer.__dict__.get(name)
        self.optimizer.__dict__[name] = ours

    def _guarded(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except BaseException:
            if self._attached:
                self._recover()
            raise

    def _only_inside_step(
        self, phase: str, inner: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        if self._depth == 0:
            raise StateError(
                f"{type(self.optimizer).__name__}.{phase}() writes parameters outside of step(), "
                "where they hold the sparse weights. Call optimizer.step(closure) instead."
            )
        return inner(*args, **kw)

    def _recover(self) -> None:
        self._depth = 0
        if self._latent:
            self.sparsifier.capture(self.indices)
            self._latent = False
        self.sparsifier.recover()

    def _is_phantom(self) -> bool:
        """torch.distributed.checkpoint makes a state by a step with lr 0 on zero gradients."""
        if self.optimizer.state:
            return False
        groups = self.optimizer.param_groups
        rates = [group.get("lr", 1) for group in groups]
        # Its own 0 is never on a device, where looking would make the host wait.
        if any(
            (isinstance(lr, Tensor) and devices.synchronizes(lr.device)) or lr != 0 for lr in rates
        ):
            return False
        gradients = (p.grad for group in groups for p in group["params"])
        return not any(g is not None and count_nonzero(g) for g in gradients)

    def _warn_of_new_groups(self) -> None:
        groups, known = self.optimizer.param_groups, self._groups
        if len(groups) == known:
            return
        self._groups = len(groups)
        new = {id(p) for group in groups[known:] for p in group["params"]}
        found = find_prunable(
            self.sparsifier.model, self.sparsifier.include, self.sparsifier.exclude
        )
        late = [p.name for p in found if id(p.parameter) in new]
        if late:
            warn(
                f"{some(late)} came to the optimizer after sparsify: it is trained dense. To "
                "prune it too, add all parameter groups before calling sparsify.",
            )

    # The optimizer's state dict

    def _places(self) -> Iterator[tuple[int, int, nn.Parameter]]:
        for g, group in enumerate(self.optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                yield g, i, parameter

    def _slot_at(self) -> dict[tuple[int, int], int]:
        slots = self.sparsifier.slots
        return {(slots[i].group, slots[i].position): i for i in self.indices}

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.sparsifier.sync()
        state = {key: dict(entries) for key, entries in state_dict["state"].items()}
        slot_at = self._slot_at()
        for g, i, parameter in self._places():
            index = slot_at.get((g, i))
            if index is None and not parameter.requires_grad:
                continue
            key = state_dict["param_groups"][g]["params"][i]
            ours = self.sparsifier.export(index)
            state.setdefault(key, {}).update({PREFIX + name: ours[name] for name in ours})
        return {**state_dict, "state": state}

    def _load(self, load_state_dict: Callable[..., Any], state_dict: dict[str, Any]) -> Any:
        """Takes our entries out of a state before the optimizer sees it."""
        state = {key: dict(entries) for key, entries in state_dict["state"].items()}
        keys = {
            (g, i): key
            for g, group in enumerate(state_dict["param_groups"])
            for i, key in enumerate(group["params"])
        }
        places = {place: state.get(key, {}) for place, key in keys.items()}
        fitting = self.sparsifier.check_loaded(*self._ours(places))
        for entries in state.values():
            for name in _ours_in(entries):
                del entries[PREFIX + name]
        plain = {**state_dict, "state": {key: e for key, e in state.items() if e}}
        result = load_state_dict(plain)
        self.sparsifier.load(fitting, self.indices)
        return result

    def _ours(
        self, places: dict[tuple[int, int], dict[str, Any]]
    ) -> tuple[dict[int, dict[str, Tensor]], list[int], list[str]]:
        """Arguments of `check_loaded`, from a state's entries by (group, position)."""
        found: dict[int, dict[str, Tensor]] = {}
        foreign = []
        slot_at = self._slot_at()
        for place, entries in places.items():
            ours = _ours_in(entries)
            if place in slot_at:
                found[slot_at[place]] = ours
            elif "header" in ours and getattr(Header.read(ours["header"]), "shape", 0) != 0:
                foreign.append("parameter {1} of group {0}".format(*place))
        return found, self.indices, foreign

    def adopt_loaded_state(self) -> None:
        """Takes over latent weights that were loaded into the optimizer before attaching."""
        loaded = [place for place in self._places() if _ours_in(self._live_state(place[2]))]
        if not loaded:
            return
        places = {(g, i): self._live_state(parameter) for g, i, parameter in loaded}
        how = (
            " To take over what fits on purpose: load the optimizer's state after sparsify, within "
            "sparsifier.relaxed_loading()."
        )
        fitting = self.sparsifier.check_loaded(*self._ours(places), how)
        self.sparsifier.load(fitting, self.indices)
        # Optimizers make a parameter's state when they find none: nothing of ours may be left.
        for _, _, parameter in loaded:
            entries = self._live_state(parameter)
            for name in _ours_in(entries):
                del entries[PREFIX + name]
            if not entries:
                del self.optimizer.state[parameter]

    def _live_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.optimizer.state.get(parameter, {})


def _ours_in(entries: dict[str, Any]) -> dict[str, Tensor]:
    """Our entries of a parameter's state, by name without the prefix."""
    return {
        key.removeprefix(PREFIX): value
        for key, value in entries.items()
        if isinstance(key, str) and key.startswith(PREFIX)
    }

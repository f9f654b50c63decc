"""What travels in an optimizer's state dict, and what a loaded one must satisfy.

Latent weights, the method's state and a header are entries of each parameter's own state, under
keys with a prefix. The header is stored as bytes, because an optimizer casts what it loads to the
parameter's type: half precision holds every byte exactly, but not every integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import StateError, some
from ..methods.base import BoundMethod
from ..weights.latent import PerTensor

FORMAT = 1
# Of the keys of our entries in the optimizer's state dict, beside its own of each parameter.
PREFIX = "feather_"

RELAXED = (
    " To load the parts that fit: with sparsifier.relaxed_loading(): "
    "optimizer.load_state_dict(state)."
)
RELAXED_EARLY = (
    " To load the parts that fit: load the optimizer's state after sparsify, within "
    "sparsifier.relaxed_loading()."
)


class Header(NamedTuple):
    """Describes the sparsifier that wrote a parameter's entries.

    Example:
        >>> header = Header(FORMAT, 3, 10, 0, 0, 0, 0)
        >>> Header.read(header.tensor()) == header
        True
    """

    format: int
    step: int
    total_steps: int
    sparsity: int
    """Final target in units of 1e-12."""
    method: int
    """Hash of the method's fingerprint."""
    shape: int
    """Hash of the parameter's shape; 0 for parameters that are not prunable."""
    image: int
    """Checksum of the parameter's effective weights; 0 for parameters that are not prunable."""

    def tensor(self) -> Tensor:
        """Return the header as uint8 of shape (56,), little-endian."""
        data = b"".join(value.to_bytes(8, "little", signed=True) for value in self)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @classmethod
    def read(cls, tensor: Tensor) -> Header | None:
        """Return the header in a tensor, None if it holds none."""
        if tensor.numel() != 8 * len(cls._fields):
            return None
        data = tensor.to("cpu", torch.uint8).numpy().tobytes()
        words = (data[i : i + 8] for i in range(0, len(data), 8))
        return cls(*(int.from_bytes(word, "little", signed=True) for word in words))

    def differences(self, other: Header) -> list[str]:
        """Return how `self` (saved) differs from `other` (present), as parts of a sentence."""
        if self.format != other.format:
            return [f"its format is {self.format}, this version reads format {other.format}"]
        found = []
        if self.total_steps != other.total_steps:
            found.append(f"its total_steps is {self.total_steps}, now {other.total_steps}")
        if self.sparsity != other.sparsity:
            found.append(f"its sparsity is {self.sparsity / 1e12:g}, now {other.sparsity / 1e12:g}")
        if self.method != other.method:
            found.append("its method or the method's options differ")
        if self.shape != other.shape:
            found.append("it belongs to another model (another shape, or other prunable weights)")
        return found


def to_bytes(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as flat uint8, a copy; exact whatever they are cast to."""
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


def from_bytes(data: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the tensor that `to_bytes` stored, None if the data does not fit `like`."""
    if data is None or data.numel() != like.numel() * like.element_size():
        return None
    return data.to(torch.uint8).clone().view(like.dtype).reshape(like.shape)


def digest(text: str) -> int:
    """Return a 63-bit hash that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Loaded(NamedTuple):
    """The checked entries of one weight tensor."""

    header: Header
    latent: Tensor
    state: dict[str, Tensor]


Entries = Mapping[str, Tensor]
"""Our entries of one parameter's state, by name without the prefix."""


@dataclass(frozen=True)
class Expected:
    """What a state must contain to belong to the present run.

    Attributes:
        names: names of the weight tensors.
        shapes: their global shapes.
        header: returns the present header of a weight tensor.
        state: the method's present state.
        strict: raise for differences; otherwise take over what fits.
    """

    names: Sequence[str]
    shapes: Sequence[torch.Size]
    header: Callable[[int], Header]
    state: Mapping[str, PerTensor]
    strict: bool


def check_loaded(
    expected: Expected,
    found: Mapping[int, Entries],
    positions: Iterable[int],
    foreign: Sequence[str] = (),
    hint: str = RELAXED,
) -> dict[int, Loaded]:
    """Return the entries of a loaded state that fit.

    Args:
        expected: the present run.
        found: entries by position of the weight tensor.
        positions: the weight tensors that the state should have.
        foreign: names of parameters that were prunable in the state and are not now.
        hint: how to load in spite of differences, for the message.

    Raises:
        StateError: a difference, unless `expected.strict` is False; or a damaged header.
    """
    if foreign and expected.strict:
        raise StateError(
            f"The state has latent weights of {some(foreign)}, which are not prunable now." + hint
        )
    fitting = {}
    for i in positions:
        name, shape = expected.names[i], expected.shapes[i]
        own = found.get(i, {})
        if not own.keys() >= {"latent", "header"}:
            if expected.strict:
                raise StateError(
                    f"The state has no latent weights for {name}: it was saved without this "
                    "sparsifier, before sparsify was called, or by something that keeps only the "
                    "optimizer's own entries (such as a flattened distributed state)." + hint
                )
            continue
        latent, saved = own["latent"], Header.read(own["header"])
        if saved is None:
            raise StateError(f"The state's header for {name} is not readable: it is damaged.")
        differences = saved.differences(expected.header(i))
        if latent.shape != shape:
            differences.append(
                f"its latent weights have shape {tuple(latent.shape)}, the parameter {tuple(shape)}"
            )
        state = {}
        for key, entry in expected.state.items():
            value = from_bytes(own.get(key), entry.rows[i])
            if value is not None:
                state[key] = value
            else:
                differences.append(f"it has no {key}, or one of another size")
        if differences and expected.strict:
            raise StateError(
                f"The state does not belong to this sparsifier ({name}): "
                f"{'; '.join(differences)}." + hint
            )
        if latent.shape == shape:
            fitting[i] = Loaded(saved, latent, state)
    return fitting


def exported(
    latent: Tensor, header: Header, method: BoundMethod | None = None, i: int = 0
) -> dict[str, Tensor]:
    """Return the entries of one parameter.

    Args:
        latent: its latent weights, a copy.
        header: its header.
        method: the method whose state travels; None for a parameter that is not prunable.
        i: position of the weight tensor.
    """
    state = {} if method is None else {k: to_bytes(e.rows[i]) for k, e in method.state.items()}
    return {"latent": latent, "header": header.tensor(), **state}


def own_entries(entries: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return our entries of a parameter's state, by name without the prefix."""
    return {
        key.removeprefix(PREFIX): value
        for key, value in entries.items()
        if isinstance(key, str) and key.startswith(PREFIX)
    }


def with_entries(
    state_dict: dict[str, Any],
    optimizer: Optimizer,
    entries: Callable[[int, int], dict[str, Tensor] | None],
) -> dict[str, Any]:
    """Return an optimizer's state dict with our entries.

    Args:
        state_dict: the state dict; it is not changed.
        optimizer: the optimizer.
        entries: returns our entries by (group, position); None for none.
    """
    state = {key: dict(own) for key, own in state_dict["state"].items()}
    for g, i, _ in parameters_of(optimizer):
        ours = entries(g, i)
        if ours is not None:
            key = state_dict["param_groups"][g]["params"][i]
            state.setdefault(key, {}).update({PREFIX + name: ours[name] for name in ours})
    return {**state_dict, "state": state}


def split(
    state_dict: dict[str, Any],
) -> tuple[dict[str, Any], dict[tuple[int, int], dict[str, Tensor]]]:
    """Return a state dict without our entries, and our entries by (group, position)."""
    state = {key: dict(own) for key, own in state_dict["state"].items()}
    ours = {
        (g, i): own_entries(state.get(key, {}))
        for g, group in enumerate(state_dict["param_groups"])
        for i, key in enumerate(group["params"])
    }
    for own in state.values():
        for name in own_entries(own):
            del own[PREFIX + name]
    return {**state_dict, "state": {key: own for key, own in state.items() if own}}, ours


def by_position(
    entries: Mapping[tuple[int, int], dict[str, Tensor]],
    position_at: Mapping[tuple[int, int], int],
) -> tuple[dict[int, Entries], list[str]]:
    """Return entries by position of the weight tensor, and names of foreign ones.

    Args:
        entries: our entries by (group, position in the group).
        position_at: position of the weight tensor at (group, position in the group).
    """
    found: dict[int, Entries] = {}
    foreign = []
    for place, ours in entries.items():
        if place in position_at:
            found[position_at[place]] = ours
        elif "header" in ours and getattr(Header.read(ours["header"]), "shape", 0) != 0:
            foreign.append("parameter {1} of group {0}".format(*place))
    return found, foreign


def parameters_of(optimizer: Optimizer) -> Iterator[tuple[int, int, nn.Parameter]]:
    """Yield (group, position in the group, parameter) of an optimizer."""
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            yield g, i, parameter


def take_live_entries(optimizer: Optimizer) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Return our entries in an optimizer's live state, loaded before `sparsify` was called."""
    found = {}
    for g, i, parameter in parameters_of(optimizer):
        ours = own_entries(optimizer.state.get(parameter, {}))
        if ours:
            found[g, i] = ours
    return found


def drop_live_entries(optimizer: Optimizer) -> None:
    """Remove our entries from an optimizer's live state.

    Optimizers initialize a parameter's state if they find none, so nothing may be left.
    """
    for _, _, parameter in parameters_of(optimizer):
        entries = optimizer.state.get(parameter, {})
        ours = own_entries(entries)
        for name in ours:
            del entries[PREFIX + name]
        if ours and not entries:
            del optimizer.state[parameter]

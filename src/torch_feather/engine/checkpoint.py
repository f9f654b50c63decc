"""Entries in an optimizer's state dict, and checks of a loaded one.

The entries are latent weights, the method's state and a header. They belong to each parameter's own
state, under keys with a prefix. The header is stored as bytes, because optimizers cast loaded state
to the type of the parameter. Half precision holds every byte exactly, but not every integer.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import StateError, some
from ..methods.base import BoundMethod
from ..weights.latent import PerTensor
from .stored_bytes import from_bytes, has_values, stored_bytes, to_bytes

FORMAT = 1
MOST_STEPS = 2**53  # of training; a header with more is damaged
# Bytes of a header with the CRC-32 of the others: the upper half of the format's number. States of
# version 0.1 hold zeros there and are not checked.
CHECKSUM = slice(4, 8)
# Prefix of the keys of these entries.
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
        """Return the header as uint8 of shape (56,), little-endian, with its checksum."""
        data = bytearray().join(value.to_bytes(8, "little", signed=True) for value in self)
        data[CHECKSUM] = zlib.crc32(data).to_bytes(4, "little")
        return torch.frombuffer(data, dtype=torch.uint8)

    @classmethod
    def read(cls, tensor: Tensor) -> Header | None:
        """Return the header in a tensor, None if it holds none or a damaged one."""
        data = stored_bytes(tensor)
        if data is None or data.numel() != 8 * len(cls._fields):
            return None
        content = bytearray(data.cpu().numpy().tobytes())
        checksum, content[CHECKSUM] = content[CHECKSUM], bytes(4)
        if any(checksum) and checksum != zlib.crc32(content).to_bytes(4, "little"):
            return None
        words = (content[i : i + 8] for i in range(0, len(content), 8))
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


def digest(text: str) -> int:
    """Return a 63-bit hash of a text, the same on every machine.

    Example:
        >>> digest("feather") == digest("feather"), digest("feather") < 2**63
        (True, True)
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Loaded(NamedTuple):
    """The checked entries of one weight tensor: header, latent weights, state of the method.

    Example:
        >>> Loaded(Header(FORMAT, 3, 10, 0, 0, 0, 0), torch.ones(2), {}).header.step
        3
    """

    header: Header
    latent: Tensor
    state: dict[str, Tensor]


Entries = Mapping[str, Tensor]
"""The entries of one parameter's state, by name without the prefix."""


@dataclass(frozen=True)
class Expected:
    """Facts about the present run that a loaded state must match.

    Attributes:
        names: names of the weight tensors.
        shapes: their global shapes.
        header: returns the present header of a weight tensor.
        state: the method's present state.
        absent: entries of it that states of earlier versions lack, with the values they stand for.
        strict: raise for differences; otherwise load the entries that fit.

    Example:
        >>> header = Header(FORMAT, 3, 10, 0, 0, 0, 0)
        >>> Expected(["w"], [torch.Size([2])], lambda i: header, {}, {}, True).header(0).step
        3
    """

    names: Sequence[str]
    shapes: Sequence[torch.Size]
    header: Callable[[int], Header]
    state: Mapping[str, PerTensor]
    absent: Mapping[str, PerTensor]
    strict: bool


def check_loaded(
    expected: Expected,
    found: Mapping[int, Entries],
    positions: Iterable[int],
    foreign: Sequence[str] = (),
    hint: str = RELAXED,
) -> dict[int, Loaded]:
    """Return the entries of a loaded state that fit, by position of the weight tensor.

    Args:
        expected: the present run.
        found: entries by position of the weight tensor.
        positions: the weight tensors that the state should have.
        foreign: names of parameters that are prunable in the state and not in the present run.
        hint: end of the message: how to load in spite of differences.

    Raises:
        StateError: the state differs and `expected.strict` is True, or a header is damaged.

    Example:
        >>> header = Header(FORMAT, 3, 10, 0, 0, 0, 0)
        >>> expected = Expected(["w"], [torch.Size([2])], lambda i: header, {}, {}, strict=True)
        >>> check_loaded(expected, {0: exported(torch.ones(2), header)}, [0])[0].latent
        tensor([1., 1.])
    """
    if foreign and expected.strict:
        raise StateError(
            f"The state has latent weights of {some(foreign)}, which are not prunable now." + hint
        )
    fitting = {}
    for i in positions:
        loaded = _check_one(expected, found.get(i, {}), i, hint)
        if loaded is not None:
            fitting[i] = loaded
    steps = {loaded.header.step: i for i, loaded in fitting.items()}
    if len(steps) > 1:
        several = " and ".join(f"{expected.names[i]} at {step}" for step, i in steps.items())
        raise StateError(
            f"The weights of the state are not of the same step: {several:.200}. Load another "
            "checkpoint."
        )
    return fitting


def _check_one(expected: Expected, own: Entries, i: int, hint: str) -> Loaded | None:
    """Return the entries of weight tensor i if they fit; errors as for `check_loaded`."""
    name, shape = expected.names[i], expected.shapes[i]
    if not own.keys() >= {"latent", "header"}:
        if expected.strict:
            raise StateError(
                f"The state has no latent weights for {name}. It was saved without this "
                "sparsifier, before sparsify was called, or without the entries that are not the "
                "optimizer's (as a flattened distributed state)." + hint
            )
        return None
    latent, saved = own["latent"], Header.read(own["header"])
    if saved is None or not 0 <= saved.step <= MOST_STEPS:
        raise StateError(f"The state's header for {name} is damaged. Load another checkpoint.")
    if not has_values(latent) or not latent.is_floating_point():
        raise StateError(
            f"The state's latent weights for {name} are damaged: they are not a dense tensor of "
            "floating-point numbers. Load another checkpoint."
        )
    present = expected.header(i)
    differences = saved.differences(present)
    if latent.shape != shape:
        differences.append(
            f"its latent weights have shape {tuple(latent.shape)}, the parameter {tuple(shape)}"
        )
    state = {}
    for key, entry in expected.state.items():
        value = from_bytes(own.get(key), entry.rows[i])
        if key not in own and key in expected.absent and saved.method == present.method:
            value = expected.absent[key].rows[i]
        if value is not None:
            state[key] = value
        else:
            differences.append(f"it has no {key}, or one of another size")
    if differences and expected.strict:
        raise StateError(
            f"The state does not belong to this sparsifier ({name}): "
            f"{'; '.join(differences)}." + hint
        )
    return Loaded(saved, latent, state) if latent.shape == shape else None


def exported(
    latent: Tensor, header: Header, method: BoundMethod | None = None, i: int = 0
) -> dict[str, Tensor]:
    """Return the entries of one parameter, by name without the prefix.

    Args:
        latent: its latent weights, a copy.
        header: its header.
        method: the method, whose state is included; None for a parameter that is not prunable.
        i: position of the weight tensor.

    Example:
        >>> list(exported(torch.ones(2), Header(FORMAT, 3, 10, 0, 0, 0, 0)))
        ['latent', 'header']
    """
    state = {} if method is None else {k: to_bytes(e.rows[i]) for k, e in method.state.items()}
    return {"latent": latent, "header": header.tensor(), **state}


def own_entries(entries: object) -> dict[str, Tensor]:
    """Return the entries with the prefix of a parameter's state, by name without the prefix.

    Example:
        >>> own_entries({"momentum_buffer": torch.ones(1), "feather_latent": torch.zeros(1)})
        {'latent': tensor([0.])}
    """
    if not isinstance(entries, Mapping):  # some optimizers keep other values in their state
        return {}
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
    """Return an optimizer's state dict with added entries.

    Args:
        state_dict: the state dict; it is not changed.
        optimizer: the optimizer.
        entries: returns the entries to add by (group, position); None for none.

    Example:
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> state = with_entries(
        ...     optimizer.state_dict(), optimizer, lambda g, i: {"latent": torch.ones(2)}
        ... )
        >>> state["state"]
        {0: {'feather_latent': tensor([1., 1.])}}
    """
    state = _copy(state_dict["state"])
    for g, i, _ in parameters_of(optimizer):
        added = entries(g, i)
        if added is not None:
            key = state_dict["param_groups"][g]["params"][i]
            state.setdefault(key, {}).update({PREFIX + name: added[name] for name in added})
    return {**state_dict, "state": state}


def split(
    state_dict: dict[str, Any],
) -> tuple[dict[str, Any], dict[tuple[int, int], dict[str, Tensor]]]:
    """Return a state dict without added entries, and these entries by (group, position).

    Example:
        >>> state = {0: {"feather_latent": torch.ones(2)}}
        >>> plain, entries = split({"state": state, "param_groups": [{"params": [0]}]})
        >>> plain["state"], entries
        ({}, {(0, 0): {'latent': tensor([1., 1.])}})
    """
    state = _copy(state_dict["state"])
    entries = {
        (g, i): own_entries(state.get(key, {}))
        for g, group in enumerate(state_dict["param_groups"])
        for i, key in enumerate(group["params"])
    }
    for key, own in list(state.items()):
        found = own_entries(own) if isinstance(own, dict) else {}
        for name in found:
            del own[PREFIX + name]
        if found and not own:
            del state[key]
    return {**state_dict, "state": state}, entries


def _copy(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a copy of a state; some optimizers keep values that are no dicts in it."""
    return {key: dict(own) if isinstance(own, dict) else own for key, own in state.items()}


def by_position(
    entries: Mapping[tuple[int, int], dict[str, Tensor]],
    position_at: Mapping[tuple[int, int], int],
) -> tuple[dict[int, Entries], list[str]]:
    """Return entries by position of the weight tensor, and names of foreign ones.

    Foreign parameters are prunable in the state and not in the present run.

    Args:
        entries: entries by (group, position in the group).
        position_at: position of the weight tensor at (group, position in the group).

    Example:
        >>> by_position({(0, 1): {"latent": torch.ones(2)}}, {(0, 1): 3})
        ({3: {'latent': tensor([1., 1.])}}, [])
    """
    found: dict[int, Entries] = {}
    foreign = []
    for (g, i), own in entries.items():
        if (g, i) in position_at:
            found[position_at[g, i]] = own
        elif "header" in own and getattr(Header.read(own["header"]), "shape", None) != 0:
            foreign.append(f"parameter {i} of group {g}")
    return found, foreign


def parameters_of(optimizer: Optimizer) -> Iterator[tuple[int, int, nn.Parameter]]:
    """Yield (group, position in the group, parameter) of an optimizer.

    Example:
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> list(parameters_of(optimizer))
        [(0, 0, tensor([1., 1.]))]
    """
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            yield g, i, parameter

"""Saving and loading: latent weights, the method's state and the step in state dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..methods.base import AnyMethod, BoundMethod
from ..methods.chosen import Chosen
from ..weights.checksum import checksum_of
from ..weights.kept import keep_nonzero
from ..weights.shards import local_part, shard_like
from . import checkpoint
from .checkpoint import Entries, Expected, Header, Loaded
from .live_entries import drop_live_entries, take_live_entries
from .sharding import require_shards_supported
from .stored_bytes import stored_bytes
from .training import Training

CHOICE = "choice"  # entry of a state whose method was chosen by "auto"


class StateDicts:
    """Reads and writes the state of a training run in state dicts.

    Args:
        sparsity: final target.
        total_steps: optimizer steps of the whole training.
        fingerprint: the method's fingerprint.
        method: the description of the method. States name it if it was chosen by "auto", and one
            that names another method continues with that.

    Attributes:
        total_steps: optimizer steps of the whole training.
        strict: raise for a state of another run; otherwise load what fits.

    Example:
        >>> from torch import nn
        >>> from torch_feather import sparsify
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> training = sparsify(model, optimizer, sparsity=0.9, total_steps=8).step.training
        >>> states = StateDicts(0.9, 8, training.method.fingerprint)
        >>> list(states.export(training, 0))
        ['latent', 'header', 'zeros']
    """

    def __init__(
        self, sparsity: float, total_steps: int, fingerprint: str, method: AnyMethod | None = None
    ):
        self._sparsity, self.total_steps = round(sparsity * 1e12), total_steps
        self._method, self.strict = checkpoint.digest(fingerprint), True
        self._chosen = method if isinstance(method, Chosen) else None
        self._writer: Chosen | None = None  # of a state that is being loaded

    def header(self, training: Training, i: int | None, image: int = 0) -> Header:
        """Return the header of a parameter.

        Args:
            training: the training run.
            i: position of the weight tensor; None for a parameter that is not prunable.
            image: checksum of its effective weights.
        """
        shape = 0
        if i is not None:
            shape = checkpoint.digest(str(tuple(training.binding.weights[i].parameter.shape)))
        return Header(
            checkpoint.FORMAT,
            int(training.count),
            self.total_steps,
            self._sparsity,
            self._method,
            shape,
            image,
        )

    def export(self, training: Training, i: int | None) -> dict[str, Tensor]:
        """Return the entries of a parameter, as copies.

        Args:
            training: the training run.
            i: position of the weight tensor; None for a parameter that is not prunable.
        """
        if i is None:
            return checkpoint.exported(torch.zeros(()), self.header(training, None))
        weight = training.binding.weights[i]
        header = self.header(training, i, checksum_of(training.weights, i, weight.local))
        latent = shard_like(training.weights.views[i].clone(), weight.parameter)
        entries = checkpoint.exported(latent, header, training.method, i)
        return entries if self._chosen is None else entries | {CHOICE: self._chosen.stored()}

    def save(
        self,
        training: Training,
        optimizer: Optimizer,
        held: Sequence[int],
        state_dict: dict[str, Any],
    ) -> dict[str, Any]:
        """Return an optimizer's state dict with the entries of its parameters.

        Args:
            training: the training run.
            optimizer: the optimizer.
            held: positions of its prunable weights.
            state_dict: its own state dict.
        """
        return checkpoint.with_entries(
            state_dict, optimizer, self._exporter(training, optimizer, held)
        )

    def live(
        self, training: Training, optimizer: Optimizer, held: Sequence[int]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """Return entries for a live state, by parameter; arguments as for `save`."""
        entries = self._exporter(training, optimizer, held)
        found: dict[Tensor, dict[str, Tensor]] = {}
        for g, i, parameter in checkpoint.parameters_of(optimizer):
            added = entries(g, i)
            if added is not None:
                found[parameter] = {checkpoint.PREFIX + name: added[name] for name in added}
        return found

    def _exporter(
        self, training: Training, optimizer: Optimizer, held: Sequence[int]
    ) -> Callable[[int, int], dict[str, Tensor] | None]:
        """Return a function of (group, position) that returns the entries of a parameter."""
        position_at = _positions(training, held)
        frozen = {
            (g, i)
            for g, i, parameter in checkpoint.parameters_of(optimizer)
            if (g, i) not in position_at and not parameter.requires_grad
        }

        def entries(g: int, i: int) -> dict[str, Tensor] | None:
            return None if (g, i) in frozen else self.export(training, position_at.get((g, i)))

        return entries

    def check(
        self,
        training: Training,
        found: Mapping[int, Entries],
        positions: Iterable[int],
        foreign: Sequence[str] = (),
        hint: str = checkpoint.RELAXED,
    ) -> dict[int, Loaded]:
        """Return the entries that fit; arguments and errors as for `checkpoint.check_loaded`."""
        self._writer = None
        writer = self._find_writer(found)
        method = training.method if writer is None else self._bind(training, writer)
        fingerprint = checkpoint.digest(method.fingerprint)
        expected = Expected(
            training.binding.names,
            [parameter.shape for parameter in training.binding.parameters],
            lambda i: self.header(training, i)._replace(method=fingerprint),
            method.state,
            method.facts.absent,
            self.strict,
        )
        loaded = checkpoint.check_loaded(expected, found, positions, foreign, hint)
        if self._chosen is not None and writer is not None:
            # Before anything changes, since a filter of the user may raise the warning.
            self._chosen.announce_writer(writer)
        self._writer = writer
        return loaded

    def _find_writer(self, found: Mapping[int, Entries]) -> Chosen | None:
        """Return the method that wrote a state, if "auto" chose another one now."""
        stored = next((own[CHOICE] for own in found.values() if CHOICE in own), None)
        if self._chosen is None or stored is None:
            return None
        writer = self._chosen.written_by(stored_bytes(stored))
        return None if writer is self._chosen else writer

    def _bind(self, training: Training, writer: Chosen) -> BoundMethod:
        """Return the method that wrote a state on the present weights."""
        assert self._chosen is not None
        method = writer.bind_like(self._chosen, training.weights)
        require_shards_supported(method, training.weights)
        training.binding.check_followed(method)
        return method

    def read(
        self, training: Training, held: Sequence[int], state_dict: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[int, Loaded]]:
        """Return a state dict without added entries, and those that fit, by position.

        Args:
            training: the training run.
            held: positions of the prunable weights of the optimizer.
            state_dict: the loaded state dict.

        Raises:
            StateError: the state belongs to another run, and `strict` is True.
        """
        plain, entries = checkpoint.split(state_dict)
        found, foreign = checkpoint.by_position(entries, _positions(training, held))
        return plain, self.check(training, found, held, foreign)

    def adopt(self, training: Training, optimizer: Optimizer, held: Sequence[int]) -> bool:
        """Load entries that were loaded into an optimizer before `sparsify` was called.

        Returns:
            Whether there were any.

        Args:
            training: the training run.
            optimizer: the optimizer.
            held: positions of its prunable weights.

        Raises:
            StateError: the state belongs to another run, and `strict` is True.
        """
        entries = take_live_entries(optimizer)
        if not entries:
            return False
        found, foreign = checkpoint.by_position(entries, _positions(training, held))
        loaded = self.check(training, found, held, foreign, checkpoint.RELAXED_EARLY)
        self.load(training, loaded, held)
        drop_live_entries(optimizer)
        return True

    @torch.no_grad()
    def load(
        self, training: Training, loaded: Mapping[int, Loaded], positions: Iterable[int]
    ) -> None:
        """Load checked entries.

        Args:
            training: the training run.
            loaded: the entries, by position of the weight tensor.
            positions: weight tensors to load. Those without entries restart from their parameters.
        """
        checksums = dict(training.written.loaded)
        if training.in_backward.is_open:
            training.recover()
        training.absorb_external_writes()
        if self._chosen is not None and self._writer is not None:
            method = self._bind(training, self._writer)  # the weights may have moved since `check`
            training.continue_with(method)
            self._method = checkpoint.digest(method.fingerprint)
            self._chosen.become(self._writer)
            self._writer = None
        weights, binding = training.weights, training.binding
        for i in positions:
            if i not in loaded:
                weights.views[i].copy_(binding.weights[i].local)
        for i, (header, latent, state) in loaded.items():
            training.count.fill_(header.step)
            checksums[i] = header.image
            own, view = local_part(latent, binding.weights[i].parameter), weights.views[i]
            view.copy_(own if own.dtype == view.dtype else keep_nonzero(own.to(view.dtype), own))
            for key, value in state.items():
                training.method.state[key].rows[i].copy_(value)
        training.forget_own_gradients()
        training.write_effective()
        training.written.loaded = checksums


def _positions(training: Training, held: Sequence[int]) -> dict[tuple[int, int], int]:
    """Return the positions of an optimizer's weights by (group, position in the group)."""
    weights = training.binding.weights
    return {(weights[i].group, weights[i].position): i for i in held}

"""An exponential moving average of the latent weights, exactly sparse when it is used.

An average of effective weights is not sparse: masks change, and an average is 0 only if the weight
was 0 at every step. The thresholded average of the latent weights is sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .engine.copies import NotPickled
from .engine.stored_bytes import has_values
from .errors import ConfigurationError, NonFiniteWeightError, StateError, some
from .methods.base import effective_weights
from .participants import remember_names
from .prunable import unwrap
from .sparsifier import Sparsifier
from .weights.latent import copy_all


class LatentAverage(NotPickled):
    """Averages the latent weights of a sparsifier and all other parameters of its model.

    Call `update` after each optimizer step. `copy_to` writes the average into a copy of the model,
    with exactly the scheduled number of zeros.

    Args:
        sparsifier: attached to the model in training.
        decay: fraction of the average that each update keeps, in [0, 1).

    Raises:
        ConfigurationError: decay is out of range, the weights are sharded, or `sparsifier` is of
            another type.
        NonFiniteWeightError: weights of the model are not finite.

    Example:
        >>> import copy
        >>> from torch_feather import sparsify
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = sparsify(
        ...     model, optimizer, sparsity=0.9, total_steps=1, schedule="constant"
        ... )
        >>> average = LatentAverage(sparsifier)
        >>> average.update()
        >>> int((average.copy_to(copy.deepcopy(model)).weight == 0).sum())
        90
    """

    def __init__(self, sparsifier: Sparsifier, decay: float = 0.999):
        if not _is_decay(decay):
            raise ConfigurationError(f"decay must lie in [0, 1), got {decay!r:.80}.")
        if not isinstance(sparsifier, Sparsifier):
            raise ConfigurationError(
                "LatentAverage requires the Sparsifier that sparsify returned, got "
                f"{type(sparsifier).__name__}."
            )
        if sparsifier.step.training.weights.shards is not None:
            raise ConfigurationError(
                "LatentAverage does not support weights that are sharded over several processes. "
                "Use DistributedDataParallel, with which it works."
            )
        self.sparsifier = sparsifier
        self.decay = decay
        sparsifier.attachment.sync()
        self._latent = [flat.clone() for flat in sparsifier.step.training.weights.flats]
        self._others = {name: p.detach().clone() for name, p in self._other_parameters()}
        _require_finite(self._latent, self._others)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights: average <- decay average + (1 - decay) w.

        Weights that are not finite leave their average unchanged.

        Raises:
            StateError: the model was moved or cast after the average began.
        """
        self.sparsifier.attachment.require_open()
        self.sparsifier.attachment.sync()
        flats = self.sparsifier.step.training.weights.flats
        if [_kind(f) for f in flats] != [_kind(f) for f in self._latent]:
            raise StateError(
                "The model was moved or cast after the average began. Create a new LatentAverage."
            )
        others = self._other_parameters()
        averages = [*self._latent, *(self._others[name] for name, _ in others)]
        values = [*flats, *(parameter.detach() for _, parameter in others)]
        for average, value in zip(averages, values, strict=True):
            moved = torch.lerp(average, value, 1.0 - self.decay)
            # Without synchronization: the host does not know whether the values are finite.
            torch.where(moved.isfinite(), moved, average, out=average)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> nn.Module:
        """Write the sparse average into a copy of the model, and return the copy.

        Buffers, such as batch-norm statistics, are copied from the model in training. Use
        `recalibrate_batchnorm` to fit them to the average.

        Args:
            model: a copy of the model in training.

        Raises:
            ConfigurationError: `model` is the model in training, or no copy of it: its parameters
                have other names, shapes, types or no values.
        """
        target, source = unwrap(model), unwrap(self.sparsifier.model)
        if target is source:
            raise ConfigurationError(
                "copy_to needs a copy of the model (copy.deepcopy(model)), not the one in training."
            )
        _check_copy(target, source)
        training = self.sparsifier.step.training
        weights = training.weights.like(self._latent)
        pruning = training.method.update(weights, training.count)
        effective = effective_weights(training.method, weights, pruning)
        copy_all([target.get_parameter(name) for name in training.binding.names], effective)
        for name, value in self._others.items():
            target.get_parameter(name).copy_(value)
        for name, buffer in source.named_buffers():
            target.get_buffer(name).copy_(buffer)
        remember_names(model, training.binding.names)
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return the average and its decay."""
        return {
            "decay": self.decay,
            "latent": [flat.clone() for flat in self._latent],
            "others": {name: value.clone() for name, value in self._others.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict()`.

        Raises:
            StateError: it belongs to another model, or to other prunable weights; or it is damaged.
            NonFiniteWeightError: its values are not finite.
        """
        if not self._accepts(state):
            raise StateError(
                "This state is damaged, or that of an average of another model or of other "
                "prunable weights. Load what LatentAverage.state_dict() returned for this model."
            )
        latent, others = state["latent"], state["others"]
        _require_finite(latent, others)
        self.decay = state["decay"]
        copy_all(self._latent, latent)
        for name, value in others.items():
            self._others[name].copy_(value)

    def _accepts(self, state: object) -> bool:
        """Return whether a loaded state has the values of an average of this model."""
        if not isinstance(state, Mapping) or not _is_decay(state.get("decay")):
            return False
        latent, others = state.get("latent"), state.get("others")
        if not isinstance(latent, list) or not isinstance(others, Mapping):
            return False
        if others.keys() != self._others.keys() or len(latent) != len(self._latent):
            return False
        present = [*self._latent, *(self._others[name] for name in others)]
        return all(map(_fits, [*latent, *others.values()], present))

    def _other_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that are not prunable, by name."""
        taken = {id(parameter) for parameter in self.sparsifier.step.training.binding.parameters}
        named = unwrap(self.sparsifier.model).named_parameters()
        return [(name, p) for name, p in named if id(p) not in taken]


def _check_copy(target: nn.Module, source: nn.Module) -> None:
    """Raise ConfigurationError unless a model can take all values of another one unchanged."""
    held = _named_values(target)
    for name, value in _named_values(source).items():
        other = held.get(name)
        if other is None:
            problem = f"it has no {name}"
        elif other.shape != value.shape:
            problem = f"{name} has shape {tuple(other.shape)}, not {tuple(value.shape)}"
        elif other.dtype != value.dtype:
            problem = f"{name} is {other.dtype}, not {value.dtype}; cast it afterwards"
        elif not has_values(other):
            problem = f"{name} has no values"
        else:
            continue
        raise ConfigurationError(
            f"copy_to needs a copy of the model in training (copy.deepcopy(model)): {problem}."
        )


def _named_values(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, without wrappers of torch.compile."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name.replace("_orig_mod.", ""): value for name, value in named}


def _is_decay(value: object) -> bool:
    """Return whether a value is a number in [0, 1)."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0.0 <= float(value) < 1.0


def _fits(value: object, average: Tensor) -> bool:
    """Return whether a loaded value can be an average."""
    return has_values(value) and value.is_floating_point() and value.shape == average.shape


def _require_finite(latent: Sequence[Tensor], others: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteWeightError if values of an average are not finite."""
    broken = [name for name, value in others.items() if not value.isfinite().all()]
    if not all(flat.isfinite().all() for flat in latent):
        broken.insert(0, "prunable weights")
    if broken:
        raise NonFiniteWeightError(
            f"An average cannot begin with values that are not finite: {some(broken)}. Load an "
            "earlier checkpoint."
        )


def _kind(flat: Tensor) -> tuple[Any, ...]:
    """Return type, device and shape, which must not change while an average is taken."""
    return flat.dtype, flat.device, flat.shape

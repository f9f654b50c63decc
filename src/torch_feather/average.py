"""An exponential moving average of the latent weights, exactly sparse when it is used.

An average of effective weights is not sparse: masks move, and a weight is 0 only where it was
always 0. Averaging the latent weights and thresholding their average is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigurationError, StateError
from .prunable import unwrap
from .sparsifier import Sparsifier
from .weights.latent import copy_all


class LatentAverage:
    """Averages what a sparsifier's optimizer trains: latent weights, and all other parameters.

    Call `update` after each optimizer step, and `copy_to` to put the average into a copy of the
    model, with exactly as many zeros as the sparsifier's present target asks for.

    Args:
        sparsifier: attached to the model in training.
        decay: share of the average that each update keeps, in [0, 1).
    """

    def __init__(self, sparsifier: Sparsifier, decay: float = 0.999):
        if not 0.0 <= decay < 1.0:
            raise ConfigurationError(f"decay must lie in [0, 1), got {decay!r}.")
        if sparsifier.weights.shards is not None:
            raise ConfigurationError(
                "LatentAverage averages whole weights, but here they are sharded over several "
                "processes. It works with DistributedDataParallel."
            )
        self.sparsifier = sparsifier
        self.decay = decay
        sparsifier.sync()
        self._latent = [flat.clone() for flat in sparsifier.weights.flats]
        self._others = {name: p.detach().clone() for name, p in self._other_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the present weights."""
        self.sparsifier.require_attached()
        self.sparsifier.sync()
        flats = self.sparsifier.weights.flats
        if [_kind(f) for f in flats] != [_kind(f) for f in self._latent]:
            raise StateError(
                "The model was moved or cast after the average began; make a new LatentAverage."
            )
        torch._foreach_lerp_(self._latent, flats, 1.0 - self.decay)
        for name, parameter in self._other_parameters():
            self._others[name].lerp_(parameter.detach(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> nn.Module:
        """Writes the sparse average into `model`, a copy of the one in training; returns it.

        Buffers, such as the statistics of batch norm, are taken from the model in training as
        they are: `recalibrate_batchnorm` fits them to the average.
        """
        target, source = unwrap(model), unwrap(self.sparsifier.model)
        if target is source:
            raise ConfigurationError(
                "copy_to wants a copy of the model (copy.deepcopy(model)), not the one in training."
            )
        weights = self.sparsifier.weights.like(self._latent)
        images = self.sparsifier.image_of(weights)
        names = [slot.name for slot in self.sparsifier.slots]
        copy_all([target.get_parameter(name) for name in names], images)
        for name, value in self._others.items():
            target.get_parameter(name).copy_(value)
        for name, buffer in source.named_buffers():
            target.get_buffer(name).copy_(buffer)
        return model

    def state_dict(self) -> dict[str, Any]:
        """The average and its decay."""
        return {
            "decay": self.decay,
            "latent": [flat.clone() for flat in self._latent],
            "others": {name: value.clone() for name, value in self._others.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict()`; raises StateError if it is of another model."""
        latent, others = state.get("latent", []), state.get("others", {})
        fits = [flat.shape for flat in latent] == [flat.shape for flat in self._latent]
        if not fits or others.keys() != self._others.keys():
            raise StateError("This average belongs to another model, or other weights took part.")
        self.decay = state["decay"]
        copy_all(self._latent, latent)
        for name, value in others.items():
            self._others[name].copy_(value)

    def _other_parameters(self) -> list[tuple[str, nn.Parameter]]:
        taken = {id(slot.parameter) for slot in self.sparsifier.slots}
        named = unwrap(self.sparsifier.model).named_parameters()
        return [(name, p) for name, p in named if id(p) not in taken]


def _kind(flat: Tensor) -> tuple[Any, ...]:
    return flat.dtype, flat.device, flat.shape

"""The method of a run with `method="auto"`, and how states of the run store it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..context import MethodContext
from ..errors import ConfigurationError, MethodChosen, StateError, printable, warn
from ..weights.latent import LatentWeights
from .base import AnyMethod, BoundMethod
from .choice import AUTO, Choice
from .registry import METHODS

BYTES = 512  # of a stored choice. A fixed size, since distributed checkpoints load into tensors

Build = Callable[[Choice], AnyMethod]
"""Returns the description of a chosen method, with the targets of the run."""


class Chosen:
    """The method that `auto` chose. A loaded state replaces it by the one that wrote the state.

    Args:
        choice: the choice.
        build: returns the description of a chosen method.

    Attributes:
        choice: name and options of the method, the reason, and the file with the evidence.
        description: the method.

    Example:
        >>> from torch_feather.methods import build_method
        >>> build = lambda choice: build_method(choice.method, sparsity=0.9, **choice.options)
        >>> Chosen(Choice("feather", {"p": 2.0}, "", ""), build).description.operator
        Power(p=2.0)
    """

    def __init__(self, choice: Choice, build: Build):
        self._build = build
        self._bound: tuple[Any, ...] = ()  # the context without weights, which may be replaced
        self.choice, self.description = choice, build(choice)

    def __repr__(self) -> str:
        return f"Chosen({self.choice.name})"

    def bind(self, context: MethodContext) -> BoundMethod:
        """Return the chosen method on one model."""
        self._bound = context.model, context.names, context.sparsity, context.total_steps
        return self.description.bind(context)

    def announce(self) -> None:
        """Tell the user what was chosen."""
        warn(
            f"method={AUTO!r} chose {self.choice}. To keep it in later versions, name the method.",
            MethodChosen,
        )

    def stored(self) -> Tensor:
        """Return the choice for a state dict: uint8 of shape (512,)."""
        text = json.dumps(asdict(self.choice))
        return torch.frombuffer(bytearray(text.encode().ljust(BYTES)), dtype=torch.uint8)

    def written_by(self, data: Tensor | None) -> Chosen:
        """Return the method that wrote a state.

        Args:
            data: bytes that `stored` returned there; None if they cannot be read.

        Returns:
            This object, if it is the same method with the same options.

        Raises:
            StateError: the bytes are damaged, or name a method or options that do not exist.
        """
        try:
            choice = Choice(**json.loads(bytes(data.cpu().numpy()) if data is not None else b""))
            texts = choice.method, choice.reason, choice.evidence
            if not isinstance(choice.options, dict) or not all(isinstance(t, str) for t in texts):
                raise TypeError
        except (ValueError, TypeError):
            raise StateError(
                "The state's name of the method that method='auto' chose is damaged. Load another "
                "checkpoint."
            ) from None
        if choice.method not in METHODS:  # a state must not import a module
            raise _not_here(choice, "does not exist here")
        if (choice.method, choice.options) == (self.choice.method, self.choice.options):
            return self
        try:
            return Chosen(choice, self._build)
        except ConfigurationError as error:  # an option of another version
            raise _not_here(choice, f"cannot be used here: {error}") from error

    def bind_like(self, other: Chosen, weights: LatentWeights) -> BoundMethod:
        """Return the method on the model that `other` is bound to, with its present weights."""
        model, names, sparsity, total_steps = other._bound
        return self.bind(MethodContext(model, names, weights, sparsity, total_steps))

    def announce_writer(self, other: Chosen) -> None:
        """Tell the user that the method that wrote a loaded state replaces this one."""
        warn(
            f"method={AUTO!r} continues with {other.choice.name}, with which the loaded state was "
            f"written. For a new run, it chose {self.choice.name}.",
            MethodChosen,
        )

    def become(self, other: Chosen) -> None:
        """Replace this method by another one."""
        self.choice, self.description = other.choice, other.description


def _not_here(choice: Choice, why: str) -> StateError:
    return StateError(
        f"The state was written with method {printable(choice.method)!r:.80}, which "
        f"method={AUTO!r} chose there and which {why.rstrip('.')}. Load another checkpoint, or "
        "install the version of torch-feather that wrote it."
    )

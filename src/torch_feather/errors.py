"""The errors that are torch-feather's own; each also is the standard error of its kind."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_OURS = ("torch", "torch_feather")


# What helps where a layer lost every weight, whatever the method.
FILL_LAYERS = (
    "Leave out what should not be emptied (exclude=), lower the sparsity, or take a method that "
    "keeps a share of each layer, such as feather with min_density=0.01."
)


class FeatherError(Exception):
    """Base of every error that torch-feather raises on purpose."""


class ConfigurationError(FeatherError, ValueError):
    """What was asked for cannot be: a wrong option, model, optimizer or target."""


class StateError(FeatherError, RuntimeError):
    """A state that was loaded, or the order of calls, does not fit this model or sparsifier."""


class FileFormatError(FeatherError, ValueError):
    """A file that is truncated, damaged, of a newer version, or no sparse file at all."""


class NonFiniteWeightError(FeatherError, FloatingPointError):
    """A latent weight became NaN, which the loss shows, or a learned threshold did."""


class FeatherWarning(UserWarning):
    """Something that training survives but that its user should know."""


def warn(message: str) -> None:
    """Issues a FeatherWarning that points at the line outside of this package and of torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FeatherWarning, stacklevel=level)


def nearest(wrong: object, known: Iterable[str]) -> str:
    """The end of a sentence that names what is most like `wrong` among the known names."""
    near = get_close_matches(str(wrong), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of many names."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"

"""The errors that are torch-feather's own; each also is the standard error of its kind."""

import warnings


class FeatherError(Exception):
    """Base of every error that torch-feather raises on purpose."""


class ConfigurationError(FeatherError, ValueError):
    """What was asked for cannot be: a wrong option, model, optimizer or target."""


class StateError(FeatherError, RuntimeError):
    """A state that was loaded, or the order of calls, does not fit this sparsifier."""


class NonFiniteWeightError(FeatherError, FloatingPointError):
    """A latent weight became NaN. It is kept in the network, so that the loss shows it."""


class FeatherWarning(UserWarning):
    """Something that training survives but that its user should know."""


def warn(message: str) -> None:
    """Issues a FeatherWarning."""
    warnings.warn(message, FeatherWarning, stacklevel=3)

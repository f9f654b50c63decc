"""ProbMask: random masks from learned probabilities."""

from .probmask import probmask

__all__ = ["probmask"]

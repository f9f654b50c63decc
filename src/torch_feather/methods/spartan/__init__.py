"""Spartan: soft top-k masks."""

from .spartan import Spartan, SpartanMethod, spartan

__all__ = ["Spartan", "SpartanMethod", "spartan"]

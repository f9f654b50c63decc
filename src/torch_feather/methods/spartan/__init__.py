"""Spartan: soft top-k masks."""

from .spartan import spartan

__all__ = ["spartan"]

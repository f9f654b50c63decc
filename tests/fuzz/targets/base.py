"""What a target is: seeds, changes, and a check of one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from ..mutate import mutate_bytes

LONGEST = 5000  # characters of a message


class Target:
    """One kind of input, and everything that reads it.

    Args:
        folder: an empty folder for files.

    Attributes:
        name: name of the folder of its findings.
        traced: packages whose lines count as coverage.
    """

    name = ""
    traced: tuple[str, ...] = ("torch_feather",)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> list[bytes]:
        """Return valid inputs to start from."""
        raise NotImplementedError

    def mutate(self, rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
        """Return a changed input.

        Args:
            rng: source of all randomness.
            content: the input to change.
            others: other inputs, of which parts may be taken.
        """
        return mutate_bytes(rng, content, others)

    def check(self, content: bytes) -> bool:
        """Read an input through every door.

        Returns:
            Whether a door accepted it.

        Raises:
            Exception: a finding, such as an error that is not one of the package.
        """
        raise NotImplementedError


def refused(door: Callable[[], Any], errors: type | tuple[type, ...] | None = None) -> bool:
    """Return whether a door raised an error of the package, with a message that can be shown.

    Args:
        door: reads the input.
        errors: the errors that it documents; None for every error of the package.
    """
    if errors is None:
        from torch_feather.errors import FeatherError

        errors = FeatherError
    try:
        door()
    except errors as error:
        text = str(error)
        text.encode()  # raises for surrogates
        assert text.strip(), "an empty message"
        assert len(text) <= LONGEST, f"a message of {len(text)} characters"
        assert not any(ord(c) < 32 and c not in "\n\t" for c in text), "control characters"
        return True
    return False

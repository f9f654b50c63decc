"""The names of many images in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class Names(Sequence[bytes]):
    """An immutable sequence of byte strings; its memory is that of their bytes.

    An array of NumPy would need the size of the longest name for each of them.

    Args:
        names: the names.

    Example:
        >>> names = Names([b"a/1.png", b"b.png"])
        >>> names[1], names.take(np.array([1, 0])).tolist()
        (b'b.png', [b'b.png', b'a/1.png'])
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self.text = np.frombuffer(b"".join(names), dtype=np.uint8)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    @classmethod
    def from_arrays(cls, text: np.ndarray, ends: np.ndarray) -> Names:
        """Return the names whose attributes `text` and `ends` were stored."""
        made = cls(())
        made.text, made.ends = text, ends
        return made

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # an index, no slice
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.text[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()

    def take(self, index: np.ndarray) -> Names:
        """Return the names at `index`, in that order."""
        return Names(self[i] for i in index.tolist())

    def tolist(self) -> list[bytes]:
        """Return the names as a list."""
        return list(self)

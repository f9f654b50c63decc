"""The gradient of Spartan on a CPU, block by block in the cache; `spartan.py` defines it.

An operation of NumPy is called faster than one of PyTorch, and writes into memory that is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...threads import for_each, scratch
from ...weights.latent import BLOCK
from ...weights.ranges import flat_arrays
from .logits import Line


class Flat(NamedTuple):
    """A weight tensor on a CPU, as flat arrays in the order of memory.

    Example:
        >>> w, out = torch.tensor([1.0, -2.0]), torch.empty(2)
        >>> flat = Flat.of(w, torch.empty(2), torch.ones(2), out)
        >>> flat.pull_back(Line(beta=2.0, scale=1.0, threshold=1.0), known=False)
        >>> out  # g m + sign(w) beta m (1 - m) g w
        tensor([1.0000, 1.3008])
    """

    latent: np.ndarray
    mask: np.ndarray
    """Memory of m."""
    gradient: np.ndarray | None = None
    out: np.ndarray | None = None

    @classmethod
    def of(cls, *tensors: Tensor) -> Flat | None:
        """Return the arrays, or None, as `flat_arrays`."""
        found = flat_arrays(*tensors)
        return None if found is None else cls(*found)

    def pull_back(self, line: Line, known: bool) -> None:
        """Write g m + sign(w) beta m (1 - m) g w / c.

        Args:
            line: gives m.
            known: whether `mask` holds m; otherwise it is written.
        """
        assert self.gradient is not None
        assert self.out is not None
        gradient, out, rate = self.gradient, self.out, line.beta * line.scale

        def block(a: int) -> None:
            part = slice(a, a + BLOCK)
            m, w = self.mask[part], self.latent[part]
            with np.errstate(all="ignore"):
                v = np.abs(w, out=scratch("magnitudes", w.size, w.dtype))
                if not known:
                    line.mask_(v, m)
                gain = np.subtract(1, m, out=scratch("rest", m.size, m.dtype))
                gain *= v
                gain *= rate
                gain += 1
                gain *= m
                np.multiply(gain, gradient[part], out=out[part])

        for_each(block, range(0, self.mask.size, BLOCK))

    def slopes(self, line: Line, known: bool) -> tuple[float, float]:
        """Write sign(w) m (1 - m) into the memory of m; return sums of G m (1 - m) and m (1 - m).

        Args:
            line: gives m.
            known: whether `mask` holds m.
        """
        rate = line.beta * line.scale

        def block(a: int) -> tuple[float, float]:
            part = slice(a, a + BLOCK)
            m, w = self.mask[part], self.latent[part]
            with np.errstate(all="ignore"):
                more, top = scratch("magnitudes", w.size, w.dtype), 0.0
                if not known:
                    line.mask_(np.abs(w, out=more), m)
                rest = np.subtract(1, m, out=scratch("rest", m.size, m.dtype))
                m *= rest
                bottom = float(torch.from_numpy(m).sum())
                if self.gradient is not None:  # g m gain; the sum needs g w m (1 - m)
                    rest *= w
                    gain = np.abs(rest, out=more)
                    gain *= rate
                    gain += 1
                    rest /= gain
                    rest *= self.gradient[part]
                    top = float(torch.from_numpy(rest).sum())
                m *= np.sign(w, out=more)
            return top, bottom

        sums = for_each(block, range(0, self.mask.size, BLOCK))
        return sum(top for top, _ in sums), sum(bottom for _, bottom in sums)

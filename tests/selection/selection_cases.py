"""Difficult scores for selections, and the comparison of two cutoffs."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from torch_feather.selection import Cutoff
from torch_feather.selection.reference import select_reference

MAKERS = {
    "normal": lambda g, n: g.standard_normal(n),
    "bf16": lambda g, n: torch.from_numpy(g.standard_normal(n) * 0.02).bfloat16().double().numpy(),
    "fp16": lambda g, n: torch.from_numpy(g.standard_normal(n) * 0.02).half().double().numpy(),
    "few distinct": lambda g, n: g.integers(0, 4, n) / 3,
    "all equal": lambda g, n: np.full(n, g.standard_normal()),
    "zeros": lambda g, n: np.zeros(n),
    "mostly zeros": lambda g, n: g.standard_normal(n) * (g.random(n) < 0.3),
    "denormal": lambda g, n: g.integers(0, 50, n) * 1e-45,
    "denormal double": lambda g, n: g.integers(0, 50, n) * 5e-324,
    "huge": lambda g, n: g.standard_normal(n) * 1e30,
    "infinite": lambda g, n: np.where(g.random(n) < 0.4, np.inf, g.standard_normal(n)),
    "nan": lambda g, n: np.where(g.random(n) < 0.4, np.nan, g.integers(0, 4, n)),
    "nan and infinite": lambda g, n: g.choice([0.0, 1.0, np.inf, np.nan, -np.nan], n),
    "all nan": lambda g, n: np.full(n, np.nan),
    "wide": lambda g, n: np.exp(g.uniform(-100, 88, n)),
}


def make(kind: str, size: int, seed: int, dtype: torch.dtype) -> Tensor:
    numbers = np.abs(MAKERS[kind](np.random.default_rng(seed), size))
    return torch.from_numpy(numbers).to(dtype)


@st.composite
def scores_and_count(draw: st.DrawFn, max_size: int = 5000) -> tuple[Tensor, int]:
    """Scores of a random kind, or of arbitrary bits, and a k from 0 to their number."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    if draw(st.booleans()):
        size = draw(st.integers(1, max_size))
        scores = make(draw(st.sampled_from(list(MAKERS))), size, draw(st.integers(0, 999)), dtype)
    else:
        width = 32 if dtype == torch.float32 else 64
        numbers = hnp.from_dtype(np.dtype(f"float{width}"), min_value=0)
        scores = torch.from_numpy(
            draw(hnp.arrays(f"float{width}", st.integers(1, 40), elements=numbers))
        )
    return scores, draw(st.integers(0, scores.numel()))


def assert_same_cutoff(got: Cutoff, expected: Cutoff, how: str = "") -> None:
    for field, a, b in zip(Cutoff._fields, got, expected, strict=True):
        assert a.shape == b.shape == (), (how, field, a, b)
        assert a.dtype == b.dtype, (how, field, a, b)
        assert a.item() == b.item(), (how, field, got, expected)


def assert_selects(got: Cutoff, scores: Tensor, k: int, how: str = "") -> None:
    """`got` is the reference's cut, and its mask is the first k of a stable sort, NaN left out."""
    assert_same_cutoff(got, select_reference(scores, k), how)
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[torch.sort(scores, stable=True).indices[:k]] = True
    assert torch.equal(got.pruned(scores), expected & ~scores.isnan()), how

"""Figure 1 of the supplement: which p the family of thresholds should have."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..analysis.plots import operators, power_name
from ..training.config import DENSE, Config
from .compare import accuracy_pictures
from .grid import Row, Run
from .spread import accuracy_table, against
from .study import Answer, Choices, Part, Picture, Study, grid

POWERS = (1.0, 2.0, 3.0, 4.0, math.inf)


def plan(config: Config, choices: Choices) -> list[Run]:
    """Feather with each p; theta follows its rule, which is the same for all of them."""
    variants: dict[str, dict] = {DENSE: {"method": DENSE}}
    variants |= {power_name(p): {"method": "feather", "options": {"p": p}} for p in POWERS}
    return grid(config, variants, choices)


def answer(rows: Sequence[Row], config: Config) -> Answer:
    """Figure 1 a and b; p = 3 against the others, and p = 2 against the two ends."""
    soft, two, three, four, hard = map(power_name, POWERS)
    pairs = [(three, two), (three, four), (three, soft), (three, hard), (two, soft), (two, hard)]
    curves = Picture(
        "operators",
        operators(POWERS),
        "What becomes of a weight: pruned below the threshold; above it, the less it shrinks the "
        "larger p is.",
    )
    sentences, differences = against(rows, pairs)
    pictures = [*accuracy_pictures(rows), curves]
    return Answer(sentences, Part(pictures, [accuracy_table(rows), *differences]))


THRESHOLD = Study(
    name="threshold",
    question="How hard should the threshold be?",
    reading="Feather prunes weights below a threshold and shrinks those above it, the less the "
    "larger p is: p = 1 is the soft threshold, p = ∞ the hard one. Everything else is the same for "
    "all curves: gradients of pruned weights are halved above 95 % (θ = ½), as Feather does.",
    source="Figure 1 of the supplement",
    plan=plan,
    answer=answer,
)

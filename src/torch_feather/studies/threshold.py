"""Figure 1 of the supplement: the exponent p of the threshold operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..analysis.plots import operators, power_name
from ..training import Config
from ..training.config import DENSE
from .comparison import compare_pairs
from .descriptions import DESCRIPTIONS
from .figures import accuracy_figure, loss_figure
from .planning import grid
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, StudyFigure
from .summary import accuracy_table

POWERS = (1.0, 2.0, 3.0, 4.0, math.inf)


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan Feather with each p; θ follows the same rule for all of them."""
    variants: dict[str, dict] = {DENSE: {"method": DENSE}}
    variants |= {power_name(p): {"method": "feather", "options": {"p": p}} for p in POWERS}
    return grid(config, variants, axes)


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return Figure 1 a and b; compare p = 3 with the others, and p = 2 with soft and hard."""
    soft, two, three, four, hard = map(power_name, POWERS)
    pairs = [(three, two), (three, four), (three, soft), (three, hard), (two, soft), (two, hard)]
    curves = StudyFigure(
        "operators",
        operators(POWERS),
        "Effective weight over latent weight: zero below the threshold; above it, a larger p "
        "shrinks the weight less.",
    )
    sentences, differences = compare_pairs(rows, pairs)
    figures = [*accuracy_figure(rows), *loss_figure(rows), curves]
    return Answer(sentences, Section(figures, [accuracy_table(rows), *differences]))


THRESHOLD = Study(**vars(DESCRIPTIONS["threshold"]), plan=_plan, answer=_answer)

"""Figure 3 of the supplement: Feather as a module in other pruning methods."""

from __future__ import annotations

from collections.abc import Sequence

from ..training import Config
from ..training.config import DENSE
from .comparison import compare_pairs
from .descriptions import DESCRIPTIONS
from .figures import plot_over_sparsity
from .planning import grid
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, StudyFigure
from .summary import accuracy_table, labels

PAIRS = {"gmp": "feather-gmp", "asl+": "feather-asl+"}


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan each backbone with and without Feather."""
    methods = [DENSE, *(name for pair in PAIRS.items() for name in pair)]
    return grid(config, {method: {"method": method} for method in methods}, axes)


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return Figure 3 a and b and the comparisons with the backbones."""
    figures = []
    for alone, joined in PAIRS.items():
        both = [row for row in rows if row["label"] in (alone, joined, DENSE)]
        if not labels(both):
            continue
        figures.append(
            StudyFigure(
                alone.replace("+", "-plus"),
                plot_over_sparsity(both),
                f"Test accuracy of {alone} with and without Feather: mean over seeds; bars: ± one "
                "standard deviation.",
            )
        )
    sentences, differences = compare_pairs(
        rows, [(joined, alone) for alone, joined in PAIRS.items()]
    )
    return Answer(sentences, Section(figures, [accuracy_table(rows), *differences]))


BACKBONES = Study(**vars(DESCRIPTIONS["backbones"]), plan=_plan, answer=_answer)

"""A search for a method more accurate than Feather, in the phases of docs/protocol.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..training import Config
from ..training.config import DENSE
from .comparison import MIN_SEEDS, Pair, compare_pairs
from .descriptions import DESCRIPTIONS
from .figures import accuracy_figure
from .phases import Phase, Variants, check_seeds
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, Table
from .summary import accuracy_table

BASELINE = "feather"
_CANDIDATES = "torch_feather.methods.candidates:feather_"


def _candidate(name: str, **options: Any) -> dict[str, Any]:
    return {"method": _CANDIDATES + name, "options": options}


_FEATHER: dict[str, Any] = {"method": BASELINE}

# In the order in which they are trained.
EXPLORED: Variants = {
    BASELINE: _FEATHER,
    "HAM (α = 2)": _candidate("ham", alpha=2.0),
    "HAM (α = 20)": _candidate("ham", alpha=20.0),
    "sensitivity (γ = 0.25)": _candidate("sensitivity", gamma=0.25),
    "phases (low = 0.9)": _candidate("phases", low=0.9),
    "sensitivity (γ = −0.25)": _candidate("sensitivity", gamma=-0.25),
    "feather (clip = none)": _FEATHER | {"optimizer.clip": None},
    # Added when HAM (α = 20) was ahead after the first seed: a stronger step, and a control.
    "HAM (α = 60)": _candidate("ham", alpha=60.0),
    "HAM (α = 200)": _candidate("ham", alpha=200.0),
    "feather (lr = 0.2)": _FEATHER | {"optimizer.lr": 0.2},
}

# Feather's own settings, one at a time. The end of the rise is a fraction of training.
TUNED: Variants = {
    BASELINE: _FEATHER,
    "θ = 0.75": _FEATHER | {"options": {"theta": 0.75}},
    "θ = 1": _FEATHER | {"options": {"theta": 1.0}},
    "p = 2": _FEATHER | {"options": {"p": 2.0}},
    "weight decay 2e-4": _FEATHER | {"optimizer.weight_decay": 2e-4},
    "weight decay 1e-3": _FEATHER | {"optimizer.weight_decay": 1e-3},
    "end = 0.3": _candidate("phases", end=0.3, count=0, last=1.0),
    "end = 0.75": _candidate("phases", end=0.75, count=0, last=1.0),
}

# The method chosen and Feather as tuned join by a commit, before the first of their runs.
COMPARED: Variants = {DENSE: {"method": DENSE}, BASELINE: _FEATHER}
PRIMARY: Pair | None = None  # labels of the method chosen and of tuned Feather
PRIMARY_SPARSITIES = (0.98, 0.99, 0.995)


EXPLORATION = Phase("exploration", EXPLORED, seeds=(1000, 1001), epochs=0.5)
TUNING = Phase("tuning", TUNED, seeds=(2000, 2001))
FINAL = Phase("final comparison", COMPARED, validation=0.0)
PHASES = (EXPLORATION, TUNING, FINAL)


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan exploration, tuning of Feather and the final comparison, in this order."""
    check_seeds(PHASES, axes.seeds)
    return [run for phase in PHASES for run in phase.runs(config, axes)]


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Compare on test images what is final; show validation accuracy of everything else."""
    by_phase = {phase: phase.rows(rows) for phase in PHASES}
    final = by_phase[FINAL]
    tables = [accuracy_table(final, "Final comparison: test accuracy")] if final else []
    sentences: list[str] = []
    if PRIMARY is not None:
        first = [row for row in final if row["sparsity"] in PRIMARY_SPARSITIES]
        sentences, primary = compare_pairs(first, [PRIMARY], together=True)
        rest = [row for row in final if row["sparsity"] not in PRIMARY_SPARSITIES]
        others = {(PRIMARY[0], BASELINE), (PRIMARY[1], BASELINE)} - {PRIMARY, (BASELINE, BASELINE)}
        _, secondary = compare_pairs(rest, [PRIMARY])
        _, untuned = compare_pairs(final, sorted(others))
        tables += [_titled("Primary", table) for table in primary]
        tables += [_titled("Secondary, no claim", table) for table in [*secondary, *untuned]]
    elif len({row["seed"] for row in final}) >= MIN_SEEDS:
        sentences = ["The final comparison has no method yet besides Feather."]
    for phase in (TUNING, EXPLORATION):
        tables.append(phase.validation_table(by_phase[phase], base=lambda variant: BASELINE))
    tables = [table for table in tables if table.rows]
    return Answer(sentences, Section(accuracy_figure(final), tables))


def _titled(title: str, table: Table) -> Table:
    return replace(table, caption=f"{title}: {table.caption}")


BEYOND = Study(**vars(DESCRIPTIONS["beyond"]), plan=_plan, answer=_answer)

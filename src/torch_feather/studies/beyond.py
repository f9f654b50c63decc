"""A search for a method more accurate than Feather, in the phases of docs/protocol.md."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..training import Config
from ..training.config import DENSE
from .comparison import Pair, compare_pairs
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

_HAM = _candidate("ham", alpha=20.0)  # what exploration found

# In the order in which they are trained.
EXPLORED: Variants = {
    BASELINE: _FEATHER,
    "HAM (α = 2)": _candidate("ham", alpha=2.0),
    "HAM (α = 20)": _HAM,
    "HAM (α = 60)": _candidate("ham", alpha=60.0),
    "sensitivity (γ = 0.25)": _candidate("sensitivity", gamma=0.25),
}
# More than 3 points below Feather with the first seed, so not trained with the second.
DROPPED: Variants = {
    "phases (low = 0.9)": _candidate("phases", low=0.9),
    "sensitivity (γ = −0.25)": _candidate("sensitivity", gamma=-0.25),
    "feather (clip = none)": _FEATHER | {"optimizer.clip": None},
    "HAM (α = 200)": _candidate("ham", alpha=200.0),
    "feather (lr = 0.2)": _FEATHER | {"optimizer.lr": 0.2},
}


def _grid(label: str, variant: Mapping[str, Any], ends: Sequence[dict[str, Any]]) -> Variants:
    """Return a method with one setting changed at a time.

    Args:
        label: its label.
        variant: its settings.
        ends: its settings if the sparsity rises for 0.3 and 0.75 of training.
    """

    def option(**options: Any) -> dict[str, Any]:
        return {**variant, "options": {**variant.get("options", {}), **options}}

    return {
        label: variant,
        f"{label}, θ = 0.75": option(theta=0.75),
        f"{label}, θ = 1": option(theta=1.0),
        f"{label}, p = 2": option(p=2.0),
        f"{label}, weight decay 2e-4": {**variant, "optimizer.weight_decay": 2e-4},
        f"{label}, weight decay 1e-3": {**variant, "optimizer.weight_decay": 1e-3},
        f"{label}, end = 0.3": ends[0],
        f"{label}, end = 0.75": ends[1],
    }


ENDS = (0.3, 0.75)
_TUNED_FEATHER = _FEATHER | {"options": {"p": 2.0}, "optimizer.weight_decay": 1e-3}
_SETTINGS: Variants = {
    **_grid(BASELINE, _FEATHER, [_candidate("phases", end=x, phases=0, last=1.0) for x in ENDS]),
    # Both settings are at least 0.5 points above the recipe's; this is the best of all cells.
    "feather, p = 2, weight decay 1e-3": _TUNED_FEATHER,
    **_grid("HAM", _HAM, [_candidate("ham", alpha=20.0, end=x) for x in ENDS]),
    "HAM, α = 10": _candidate("ham", alpha=10.0),
    "HAM, α = 40": _candidate("ham", alpha=40.0),
}
# Below the recipe's settings with the first seed, so not trained with the second.
_LOST = (
    *("feather, θ = 0.75", "feather, θ = 1", "feather, weight decay 2e-4"),
    *("feather, end = 0.3", "feather, end = 0.75"),
    *("HAM, θ = 0.75", "HAM, θ = 1", "HAM, p = 2"),
    *("HAM, weight decay 2e-4", "HAM, weight decay 1e-3"),
    *("HAM, end = 0.3", "HAM, end = 0.75", "HAM, α = 10"),
)
TUNED: Variants = {name: value for name, value in _SETTINGS.items() if name not in _LOST}
TUNED_ONCE: Variants = {name: _SETTINGS[name] for name in _LOST}

TUNED_FEATHER, CHOSEN = "feather (tuned)", "feather-ham (α = 40)"
COMPARED: Variants = {
    TUNED_FEATHER: _TUNED_FEATHER,
    CHOSEN: {"method": "feather-ham", "options": {"alpha": 40.0}},
}
# Trained after the runs of the comparison, with as many of its seeds as time allows.
REFERENCES: Variants = {BASELINE: _FEATHER, DENSE: {"method": DENSE}}
PRIMARY: Pair = CHOSEN, TUNED_FEATHER
PRIMARY_SPARSITIES = (0.98, 0.99, 0.995)
SEEDS = range(3, 13)  # of the final comparison


EXPLORATION = Phase("exploration", EXPLORED, (1000, 1001), epochs=0.5, sparsities=(0.99,))
ONE_SEED = Phase("exploration, dropped", DROPPED, (1000,), epochs=0.5, sparsities=(0.99,))
TUNING_ONCE = Phase("tuning, dropped", TUNED_ONCE, (2000,), sparsities=(0.99,))
TUNING = Phase("tuning", TUNED, (2000, 2001), sparsities=(0.99,))
FINAL = Phase("final comparison", COMPARED, validation=0.0)
REFERENCE = Phase("references", REFERENCES, validation=0.0)
PHASES = (EXPLORATION, ONE_SEED, TUNING_ONCE, TUNING, FINAL, REFERENCE)
# With the phase that has the other cells of the same purpose, trained with one seed.
WITH_DROPPED = ((TUNING, TUNING_ONCE), (EXPLORATION, ONE_SEED))


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan exploration, tuning and the final comparison, in this order."""
    check_seeds(PHASES, axes.seeds)
    return [run for phase in PHASES for run in phase.runs(config, axes)]


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Compare on test images what is final; show validation accuracy of everything else."""
    by_phase = {phase: phase.rows(rows) for phase in PHASES}
    final = by_phase[FINAL] + by_phase[REFERENCE]
    tables = [accuracy_table(final, "Final comparison: test accuracy")] if final else []
    sentences: list[str] = []
    if final:
        first = [row for row in final if row["sparsity"] in PRIMARY_SPARSITIES]
        sentences, primary = compare_pairs(first, [PRIMARY], together=True)
        done = {(row["label"], row["sparsity"], row["seed"]) for row in first}
        missing = {*itertools.product(PRIMARY, PRIMARY_SPARSITIES, SEEDS)} - done
        if missing:
            count = len(PRIMARY) * len(PRIMARY_SPARSITIES) * len(SEEDS)
            sentences = [f"No conclusion yet: {len(missing)} of {count} primary runs are missing."]
        rest = [row for row in final if row["sparsity"] not in PRIMARY_SPARSITIES]
        _, secondary = compare_pairs(rest, [PRIMARY])
        _, untuned = compare_pairs(final, [(name, BASELINE) for name in PRIMARY])
        title = "Primary, interim, no claim" if missing else "Primary"
        tables += [_titled(title, table) for table in primary]
        tables += [_titled("Secondary, no claim", table) for table in [*secondary, *untuned]]
    tables += [_with_dropped(phase, dropped, by_phase) for phase, dropped in WITH_DROPPED]
    tables = [table for table in tables if table.rows]
    return Answer(sentences, Section(accuracy_figure(final), tables))


def _with_dropped(phase: Phase, dropped: Phase, by_phase: Mapping[Phase, list[Row]]) -> Table:
    """Return one table of two phases; the seeds of the second are among those of the first."""
    both = replace(phase, variants={**phase.variants, **dropped.variants})
    renamed = [
        row | {"label": row["label"].replace(dropped.name, phase.name)} for row in by_phase[dropped]
    ]

    def base(variant: str) -> str:
        return variant.split(",")[0] if phase is TUNING else BASELINE

    return both.validation_table([*by_phase[phase], *renamed], base)


def _titled(title: str, table: Table) -> Table:
    return replace(table, caption=f"{title}: {table.caption}")


BEYOND = Study(**vars(DESCRIPTIONS["beyond"]), plan=_plan, answer=_answer)

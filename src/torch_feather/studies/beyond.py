"""A search for a method more accurate than Feather, in the phases of docs/protocol.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigurationError
from ..training import Config
from ..training.config import DENSE, apply
from .comparison import MIN_SEEDS, Pair, compare_pairs, interval, paired
from .descriptions import DESCRIPTIONS
from .figures import accuracy_figure
from .planning import grid
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, Table
from .summary import accuracy_table, group, percent, signed, with_deviation

Variants = Mapping[str, Mapping[str, Any]]

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


@dataclass(frozen=True, eq=False)
class Phase:
    """Runs with one purpose.

    Attributes:
        name: name of the phase.
        variants: what is trained, as for `planning.grid`.
        seeds: seeds of the runs; empty for those of the command line.
        epochs: fraction of the recipe's epochs.
        validation: fraction of the training images that are held out and measured; 0 for none, if
            test images are measured.

    Example:
        >>> EXPLORATION.label("feather"), FINAL.label("feather")
        ('exploration: feather', 'feather')
    """

    name: str
    variants: Variants
    seeds: tuple[int, ...] = ()
    epochs: float = 1.0
    validation: float = 0.1

    def label(self, variant: str) -> str:
        """Return the label of a variant's runs, which differs between phases."""
        return f"{self.name}: {variant}" if self.seeds else variant

    def runs(self, config: Config, axes: GridAxes) -> list[Run]:
        """Return the runs of this phase.

        Args:
            config: common settings of the study.
            axes: sparsities, and the seeds of the final comparison.
        """
        epochs = max(1, round(self.epochs * config.epochs))
        settings = {"epochs": epochs, "data.validation": self.validation}
        mine = apply(config, settings, self.name)
        labelled = {self.label(name): variant for name, variant in self.variants.items()}
        return grid(mine, labelled, replace(axes, seeds=self.seeds or axes.seeds))


EXPLORATION = Phase("exploration", EXPLORED, seeds=(1000, 1001), epochs=0.5)
TUNING = Phase("tuning", TUNED, seeds=(2000, 2001))
FINAL = Phase("final comparison", COMPARED, validation=0.0)
PHASES = (EXPLORATION, TUNING, FINAL)


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan exploration, tuning of Feather and the final comparison, in this order."""
    used = sorted({seed for phase in PHASES for seed in phase.seeds} & set(axes.seeds))
    if used:
        raise ConfigurationError(
            f"--seeds {used[0]}: exploration and tuning use this seed. Choose others for the final "
            "comparison."
        )
    return [run for phase in PHASES for run in phase.runs(config, axes)]


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Compare on test images what is final; show validation accuracy of everything else."""
    by_phase = {phase: _rows_of(phase, rows) for phase in PHASES}
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
    tables += [_validation_table(phase, by_phase[phase]) for phase in (TUNING, EXPLORATION)]
    tables = [table for table in tables if table.rows]
    return Answer(sentences, Section(accuracy_figure(final), tables))


def _titled(title: str, table: Table) -> Table:
    return replace(table, caption=f"{title}: {table.caption}")


def _rows_of(phase: Phase, rows: Sequence[Row]) -> list[Row]:
    known = {phase.label(name) for name in phase.variants}
    return [row for row in rows if row["label"] in known]


def validation_accuracy(row: Row) -> float:
    """Return the accuracy on validation images after the last epoch, in %.

    Args:
        row: a run with validation images.

    Example:
        >>> validation_accuracy({"curve": {"val_acc": [0.25, 0.5]}})
        50.0
    """
    return 100 * row["curve"]["val_acc"][-1]


def _validation_table(phase: Phase, rows: Sequence[Row]) -> Table:
    """Return validation accuracies, and differences from Feather with the same seeds."""
    caption = (
        f"{phase.name.capitalize()} (seeds {', '.join(map(str, phase.seeds))}): accuracy on "
        "validation images, held out of the training images; no conclusion is drawn. Differences "
        "from Feather are paired over seeds, with uncorrected 95% t intervals."
    )
    groups, lines = group(rows), []
    for (label, sparsity), mine in sorted(groups.items(), key=lambda item: item[0][1]):
        base = groups.get((phase.label(BASELINE), sparsity), [])
        values = paired(mine, base, validation_accuracy) if mine != base else []
        minutes = [row["seconds"] / 60 for row in mine]
        lines.append(
            [
                label.removeprefix(f"{phase.name}: "),
                percent(sparsity),
                with_deviation([validation_accuracy(row) for row in mine]),
                signed(statistics.mean(values)) if values else "–",
                _interval(values),
                str(len(mine)),
                str(mine[0]["epochs"]),
                f"{statistics.mean(minutes):.0f}",
            ]
        )
    head = ["method", "sparsity", "validation accuracy (%)", "difference (points)", "95% CI", "n"]
    return Table(caption, [*head, "epochs", "minutes per run"], lines)


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2 or statistics.stdev(values) < 1e-9:
        return "–"
    low, high = interval(values)
    return f"{signed(low)} to {signed(high)}"


BEYOND = Study(**vars(DESCRIPTIONS["beyond"]), plan=_plan, answer=_answer)

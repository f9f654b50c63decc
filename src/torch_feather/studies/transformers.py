"""Sparse training of small transformers, in the phases of docs/protocol.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..training import Config
from ..training.config import DENSE
from .compare import first_with_others
from .comparison import compare_pairs
from .descriptions import DESCRIPTIONS
from .figures import accuracy_figure
from .metric import ACCURACY, Metric, metric_of
from .phases import Phase, Variants, check_seeds
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, Table
from .summary import Column, accuracy_table, with_deviation
from .timings import latency_columns, measure

BASELINES: Variants = {name: {"method": name} for name in (DENSE, "feather", "gmp")}
DECAYS = (0.01, 1.0)  # besides the recipes' 0.1
THETAS = (0.0, 0.5)  # besides Feather's own, which is 1 up to 95%
EXPLORED: Variants = {
    **BASELINES,
    **{
        f"{name} (weight decay = {decay:g})": {**variant, "optimizer.weight_decay": decay}
        for name, variant in BASELINES.items()
        for decay in DECAYS
    },
    **{f"feather (θ = {t:g})": {"method": "feather", "options": {"theta": t}} for t in THETAS},
}
EXPLORATION = Phase("exploration", EXPLORED, seeds=(1000, 1001), epochs=0.5, sparsities=(0.9,))

# Methods of the final comparison, in the order of the page. A new method joins by a commit.
COMPARED: Variants = BASELINES
# What exploration chose: recipe to label to settings. A recipe joins by a commit, before the first
# of its final runs; until then, the study plans exploration alone.
CHOSEN: Mapping[str, Variants] = {}
EXPLORED_RECIPES = ("gpt-char", "cifar100-vit-small")
PATTERN = "2:4"


def _patterned(label: str) -> str:
    return f"{label} ({PATTERN})"


def _final(recipe: str | None) -> list[Phase]:
    """Return the phases on test data, with the settings that exploration chose for a recipe."""
    chosen = CHOSEN.get(str(recipe), {})
    variants = {label: {**variant, **chosen.get(label, {})} for label, variant in COMPARED.items()}
    patterned = {
        _patterned(label): {**v, "options": {**v.get("options", {}), "pattern": PATTERN}}
        for label, v in variants.items()
        if label in ("feather", "gmp")
    }
    return [
        Phase("final comparison", variants, validation=0.0),
        Phase(PATTERN, patterned, validation=0.0, sparsities=(0.5,)),
    ]


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan exploration, then the final comparison once its settings are chosen.

    Images get the vision transformer, and texts the language model.
    """
    check_seeds([EXPLORATION], axes.seeds)
    network = "gpt_small" if config.data.name == "text" else "vit_small"
    config = replace(config, network=network)
    phases = [EXPLORATION]
    if config.recipe not in EXPLORED_RECIPES or config.recipe in CHOSEN:
        phases += _final(config.recipe)
    return [run for phase in phases for run in phase.runs(config, axes)]


def _measure(row: Row, run: Path, out: Path, data_path: str | None, time: bool) -> Row:
    """Time the networks of the final comparison."""
    if EXPLORATION.rows([row]):
        return {}
    return measure(row, run, out, data_path, time)


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Compare on test data what is final; show validation data of exploration."""
    metric = metric_of(rows)
    final, patterned = (phase.rows(rows) for phase in _final(None))
    sentences, primary = compare_pairs(
        final, first_with_others(final), together=True, metric=metric
    )
    pairs = [(_patterned("feather"), _patterned("gmp"))]
    pairs += [(_patterned(label), label) for label in ("feather", "gmp")]
    half = [row for row in final if row["sparsity"] in (0.0, 0.5)]
    _, secondary = compare_pairs([*patterned, *half], pairs, metric=metric)
    explored = EXPLORATION.rows(rows)
    caption = f"{PATTERN} (2 of 4 neighbors are zero), saved as a dense file: {metric.name}"
    columns, timed = _columns([*final, *patterned], metric)
    tables = [
        accuracy_table(final, f"Final comparison: {metric.name}{timed}", columns, metric),
        *(_titled("Primary", table) for table in primary),
        accuracy_table(patterned, caption + timed, columns, metric),
        *(_titled("Secondary, no claim", table) for table in secondary),
        EXPLORATION.validation_table(explored, lambda name: name.split(" (")[0], metric),
    ]
    shown = [table for table in tables if table.rows]
    return Answer(sentences, Section(accuracy_figure(final, metric), shown))


def _titled(title: str, table: Table) -> Table:
    return replace(table, caption=f"{title}: {table.caption}")


def _columns(rows: Sequence[Row], metric: Metric) -> tuple[list[Column], str]:
    """Return accuracy besides bits, and latency if all is timed, with the end of a caption."""
    columns: list[Column] = []
    if metric is not ACCURACY:
        columns.append(("accuracy of the next character (%)", _accuracy))
    if not rows or not all("milliseconds" in row for row in rows):
        return columns, ""
    cpu = ", ".join(sorted({row["timed_on"] for row in rows}))
    return columns + latency_columns(rows), f"; latency of one sample, one thread of {cpu}"


def _accuracy(rows: Sequence[Row]) -> str:
    return with_deviation(ACCURACY.values(rows))


TRANSFORMERS = Study(
    **vars(DESCRIPTIONS["transformers"]), plan=_plan, answer=_answer, measure=_measure
)

"""Accuracy against measured latency, next to multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.kernels import llvm
from ..training import Config
from .descriptions import DESCRIPTIONS
from .flops import BIASED
from .pareto import FRONT_NOTE, MILLISECONDS, MULTIPLY_ADDS, cost_figures, front_sentences
from .planning import grid
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study
from .summary import accuracy_table
from .timings import latency_columns, measure


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan each method, feather-flops with both costs: multiply-adds and milliseconds.

    Raises:
        RuntimeMissingError: the CPU runtime is not installed, so networks cannot be timed.
    """
    llvm()  # fail before the training, not after it
    variants: dict[str, dict] = {}
    for label, variant in axes.variants.items():
        variants[label] = variant
        if label == BIASED:
            timed = {"method": BIASED, "options": {"costs": "milliseconds"}}
            variants[f"{BIASED} (milliseconds)"] = timed
    return grid(config, variants, axes)


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return accuracy over latency and over multiply-adds."""
    cpu = ", ".join(sorted({row["timed_on"] for row in rows}))
    means = "means over seeds; bars: ± one standard deviation of both."
    latency = f"Test accuracy against latency (one image, one thread of {cpu}): {means}"
    same = f"Test accuracy of the same networks against multiply-adds: {means}"
    figures = [
        *cost_figures("milliseconds", rows, MILLISECONDS, f"{latency} {FRONT_NOTE}"),
        *cost_figures("multiply-adds", rows, MULTIPLY_ADDS, f"{same} {FRONT_NOTE}"),
    ]
    columns = latency_columns(rows)
    caption = f"Test accuracy and latency: one image, one thread of {cpu}"
    return Answer(
        front_sentences(rows, MILLISECONDS),
        Section(figures, [accuracy_table(rows, caption, columns)]),
    )


LATENCY = Study(**vars(DESCRIPTIONS["latency"]), plan=_plan, answer=_answer, measure=measure)

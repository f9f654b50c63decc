"""Figure 4 of the supplement: accuracy against multiply-adds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ..analysis.plots import panel
from ..training import Config
from .comparison import compare_pairs
from .descriptions import DESCRIPTIONS
from .figures import accuracy_figure, label_lines, published_styles
from .pareto import (
    FRONT_NOTE,
    MULTIPLY_ADDS,
    cost_figures,
    format_cost_axis,
    front_sentences,
    plot_front,
)
from .planning import grid
from .published import RESNET50
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, StudyFigure, Table
from .summary import accuracy_table, labels, percent

BIASED = "feather-flops"
GAMMAS = (0.125, 0.25, 0.5)


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan each method, feather-flops with each γ."""
    variants: dict[str, dict] = {}
    for label, variant in axes.variants.items():
        if label == BIASED:
            variants |= {f"{BIASED} (γ = {gamma:g})": _biased(gamma) for gamma in GAMMAS}
        else:
            variants[label] = variant
    return grid(config, variants, axes)


def _biased(gamma: float) -> dict[str, Any]:
    """Return the variant of feather-flops with this γ."""
    return {"method": BIASED, "options": {"gamma": gamma}}


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return Figure 4 with the Pareto front, and the published ResNet-50 in its own section."""
    fraction = (
        "of dense",
        lambda found: f"{100e6 * MULTIPLY_ADDS.mean(found) / found[0]['dense_macs']:.2f}%",
    )
    caption = (
        "Test accuracy against multiply-adds: means over seeds; bars: ± one standard deviation of "
        f"both. {FRONT_NOTE}"
    )
    feather = [label for label in labels(rows) if label.startswith("feather")]
    others = [label for label in labels(rows) if label not in feather]
    sentences, differences = compare_pairs(rows, itertools.product(feather, others))
    return Answer(
        [*front_sentences(rows, MULTIPLY_ADDS), *sentences],
        Section(
            [*cost_figures("pareto-front", rows, MULTIPLY_ADDS, caption), *accuracy_figure(rows)],
            [accuracy_table(rows, more=[fraction]), *differences],
        ),
        _published(rows),
    )


def _published(rows: Sequence[Row]) -> Section:
    """Return figure and table of published ResNet-50 results on ImageNet.

    Args:
        rows: the study's runs, whose line styles are used for the same methods.
    """
    figure, axes = panel(5.2, 4.6)
    with_cost = [
        (series, [(p.macs, p.accuracy) for p in series.points if p.macs is not None])
        for series in RESNET50
    ]
    with_cost = [(series, points) for series, points in with_cost if points]
    plot_front(axes, [point for _, points in with_cost for point in points])
    styles = published_styles([series for series, _ in with_cost], rows)
    for (series, points), style in zip(with_cost, styles, strict=True):
        axes.plot(*zip(*points, strict=True), label=series.title, **style)
    format_cost_axis(axes, MULTIPLY_ADDS)
    axes.set_ylabel("top-1 accuracy on ImageNet (%)")
    label_lines(axes)
    lines = [
        [
            series.title,
            percent(point.sparsity),
            f"{point.accuracy:.2f}",
            "–" if point.macs is None else f"{point.macs:g}",
            series.source,
        ]
        for series in RESNET50
        for point in series.points
    ]
    head = ["method", "sparsity", "top-1 accuracy (%)", "multiply-adds (M)", "source"]
    caption = (
        "Published: ResNet-50 on ImageNet; dense: 77.0% with 4089 M. Only results published with "
        f"their multiply-adds are plotted. {FRONT_NOTE}"
    )
    return Section(
        [StudyFigure("published", figure, caption)], [Table("ResNet-50 on ImageNet", head, lines)]
    )


FLOPS = Study(**vars(DESCRIPTIONS["flops"]), plan=_plan, answer=_answer)

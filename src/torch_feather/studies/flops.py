"""Figure 4 of the supplement: accuracy against multiply-adds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..analysis.plots import GREY, look, panel
from ..training.config import DENSE, Config
from . import compare
from .figures import below, looks
from .grid import Row, Run
from .published import RESNET50
from .spread import (
    ENOUGH,
    Groups,
    accuracies,
    accuracy_table,
    against,
    apart,
    deviation,
    group,
    labels,
    mean,
    paired,
    percent,
    sparsities,
)
from .study import Answer, Choices, Part, Picture, Study, Table, grid

BIASED = "feather-flops"
GAMMAS = (0.125, 0.25, 0.5)
GREY_IS = "Grey: the frontier, which nothing beats at the same cost or below."


@dataclass(frozen=True)
class Cost:
    """What an answer of a network costs: a number of its row, in units of `unit`."""

    key: str
    unit: float
    symbol: str
    axis: str

    def of(self, row: Row) -> float:
        """Of one run."""
        return row[self.key] / self.unit

    def mean(self, rows: Sequence[Row]) -> float:
        """Over seeds."""
        return statistics.mean(map(self.of, rows))


MULTIPLY_ADDS = Cost("macs", 1e6, "M", "multiply-adds an image, millions (logarithmic)")


def plan(config: Config, choices: Choices) -> list[Run]:
    """Each method; the FLOPs-biased one with each bias gamma."""
    variants: dict[str, dict] = {}
    for label, variant in choices.variants.items():
        if label == BIASED:
            variants |= {f"{BIASED} (γ = {gamma:g})": biased(gamma) for gamma in GAMMAS}
        else:
            variants[label] = variant
    return grid(config, variants, choices)


def biased(gamma: float) -> dict:
    """The variant with this bias."""
    return {"method": BIASED, "options": {"gamma": gamma}}


def answer(rows: Sequence[Row], config: Config) -> Answer:
    """Figure 4, with the frontier; the published ResNet-50 apart."""
    share = (
        "of dense",
        lambda found: f"{100e6 * MULTIPLY_ADDS.mean(found) / found[0]['dense_macs']:.2f} %",
    )
    about = (
        "Test accuracy against multiply-adds, means over seeds; bars: ± one standard deviation of "
        f"both. {GREY_IS}"
    )
    ours = [label for label in labels(rows) if label.startswith("feather")]
    others = [label for label in labels(rows) if label not in ours]
    sentences, differences = against(rows, itertools.product(ours, others))
    return Answer(
        [*on_the_frontier(rows, MULTIPLY_ADDS), *sentences],
        Part(
            [
                *drawn("frontier", rows, MULTIPLY_ADDS, about),
                *compare.accuracy_pictures(rows)[:1],
            ],
            [accuracy_table(rows, more=[share]), *differences],
        ),
        published(rows),
    )


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (cost, accuracy) that no other point matches at the same cost or below, by cost."""
    best: list[tuple[float, float]] = []
    for macs, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((macs, accuracy))
    return best


def on_the_frontier(rows: Sequence[Row], cost: Cost) -> list[str]:
    """What is best for its cost: at each sparsity, and of all that was trained."""
    sparse = {key: mine for key, mine in group(rows).items() if mine[0]["method"] != DENSE}
    told = []
    for sparsity in sparsities(rows):
        here = {key: mine for key, mine in sparse.items() if key[1] == sparsity}
        if len(here) < 2 or min(map(len, here.values())) < ENOUGH:
            continue
        best = _best(here, cost)
        names = [
            f"{key[0]} ({cost.mean(here[key]):.3g} {cost.symbol}, {mean(here[key]):.1f} %)"
            for key in best
        ]
        close = [
            f"{a[0]} and {b[0]}"
            for a, b in itertools.pairwise(best)
            if not apart(paired(here[b], here[a]))
        ]
        fewest = min(map(len, here.values()))
        told.append(
            f"Best for their cost at {percent(sparsity)}, from cheap to accurate, by means over "
            f"seeds (n ≥ {fewest}): {', '.join(names)}"
            + "; every other one here is matched or beaten at its cost or below"
            * (len(best) < len(here))
            + (f". Not told apart in accuracy: {'; '.join(close)}" if close else "")
            + "."
        )
    if len(told) > 1:
        names = [f"{label} at {percent(sparsity)}" for label, sparsity in _best(sparse, cost)]
        told.append(f"The frontier over all sparsities (grey): {', '.join(names)}.")
    return told


def _best(groups: Groups, cost: Cost) -> list[tuple[str, float]]:
    """Those on the frontier, from cheap to accurate."""
    where = {(cost.mean(mine), mean(mine)): key for key, mine in groups.items()}
    return [where[point] for point in frontier(where)]


def drawn(name: str, rows: Sequence[Row], cost: Cost, caption: str) -> list[Picture]:
    """The picture of `draw`; none where there is no sparse network yet."""
    return [Picture(name, draw(rows, cost), caption)] if labels(rows) else []


def draw(rows: Sequence[Row], cost: Cost) -> Figure:
    """A curve for each method, from its sparsest network to its densest."""
    figure, axes = panel(5.2, 4.6)
    groups = group(rows)
    _stairs(axes, [(cost.mean(mine), mean(mine)) for (m, _), mine in groups.items() if m != DENSE])
    for i, name in enumerate(labels(rows)):
        found = [groups[name, s] for s in sparsities(rows) if (name, s) in groups]
        axes.errorbar(
            [cost.mean(mine) for mine in found],
            [mean(mine) for mine in found],
            [deviation(accuracies(mine)) for mine in found],
            [deviation([cost.of(row) for row in mine]) for mine in found],
            label=f"{name} (n={min(map(len, found))})",
            **look(i),
        )
    _cost_axis(axes, cost)
    axes.set_ylabel("test accuracy, %")
    below(axes)
    return figure


def _stairs(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    best = frontier(points)
    axes.step(*zip(*best, strict=True), where="post", color=GREY, alpha=0.35, linewidth=6, zorder=0)


def _cost_axis(axes: Axes, cost: Cost) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(cost.axis)


def published(ours: Sequence[Row]) -> Part:
    """ResNet-50 on ImageNet."""
    figure, axes = panel(5.2, 4.6)
    priced = [
        (series, [(p.macs, p.accuracy) for p in series.points if p.macs is not None])
        for series in RESNET50
    ]
    priced = [(series, points) for series, points in priced if points]
    _stairs(axes, [point for _, points in priced for point in points])
    styles = looks([series for series, _ in priced], ours)
    for (series, points), style in zip(priced, styles, strict=True):
        axes.plot(*zip(*points, strict=True), label=series.method, **style)
    _cost_axis(axes, MULTIPLY_ADDS)
    axes.set_ylabel("top-1 accuracy on ImageNet, %")
    below(axes)
    rows = [
        [
            series.method,
            percent(point.sparsity),
            f"{point.accuracy:.2f}",
            "–" if point.macs is None else f"{point.macs:g}",
            series.source,
        ]
        for series in RESNET50
        for point in series.points
    ]
    head = ["", "sparsity", "top-1 accuracy, %", "multiply-adds, M", "source"]
    return Part(
        [
            Picture(
                "published",
                figure,
                "Published: ResNet-50 on ImageNet; dense: 77.0 % with 4089 M. Only what was "
                f"published with its multiply-adds is drawn. {GREY_IS}",
            )
        ],
        [Table("ResNet-50 on ImageNet", head, rows)],
    )


FLOPS = Study(
    name="flops",
    question="Which method gives the most accurate network for its multiply-adds?",
    reading="Two networks with equally many zeros can cost differently: a weight of an early layer "
    "is used at more pixels. feather-flops ranks weights by |w| / cost^γ, so it prunes costly "
    "layers harder, the more the larger γ is; γ = 0 would be feather.",
    source="Figure 4 of the supplement",
    plan=plan,
    answer=answer,
    methods="dense,feather,feather-flops,gmp:allocation=uniform,str,st3",
)

"""Accuracy against the cost of a network: Pareto fronts, and sentences and figures about them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..analysis.plots import GREY, line_style, panel, plain
from ..training.config import DENSE
from .comparison import MIN_SEEDS, is_significant, paired
from .figures import label_lines, number_of_runs
from .runs import Row
from .study import StudyFigure
from .summary import Groups, accuracies, deviation, group, labels, mean, percent, sparsities

Point = tuple[float, float]  # cost, accuracy

FRONT_NOTE = "Grey: the Pareto front, points not exceeded in accuracy at the same or lower cost."


@dataclass(frozen=True)
class Cost:
    """A cost of running a network.

    Attributes:
        key: key of a row.
        unit: divisor that converts the value to the displayed unit.
        symbol: displayed unit.
        axis: label of an axis.

    Example:
        >>> MULTIPLY_ADDS.of({"macs": 5_000_000})  # millions
        5.0
    """

    key: str
    unit: float
    symbol: str
    axis: str

    def of(self, row: Row) -> float:
        """Return the cost of one run."""
        return row[self.key] / self.unit

    def mean(self, rows: Sequence[Row]) -> float:
        """Return the mean cost over seeds."""
        return statistics.mean(map(self.of, rows))


MULTIPLY_ADDS = Cost("macs", 1e6, "M", "multiply-adds per image (millions, log scale)")
MILLISECONDS = Cost("milliseconds", 1.0, "ms", "latency per image (ms, log scale)")


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other matches in accuracy at the same or lower cost.

    Args:
        points: (cost, accuracy) pairs.

    Returns:
        The front in ascending order of cost.

    Example:
        >>> pareto_front([(1, 5), (2, 4), (2, 9), (3, 9)])
        [(1, 5), (2, 9)]
    """
    front: list[Point] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def front_sentences(rows: Sequence[Row], cost: Cost) -> list[str]:
    """Return sentences about the Pareto front: of each sparsity, and over all sparsities.

    Sparsities with fewer than `MIN_SEEDS` seeds of a method, or with one method, are left out.

    Args:
        rows: the runs.
        cost: the cost to compare.

    Example:
        >>> rows = [
        ...     {"method": m, "label": m, "sparsity": 0.9, "seed": s} | results
        ...     for m, results in (
        ...         ("feather", {"test_accuracy": 0.8, "macs": 5e6}),
        ...         ("gmp", {"test_accuracy": 0.7, "macs": 6e6}),
        ...     )
        ...     for s in range(3)
        ... ]
        >>> for sentence in front_sentences(rows, MULTIPLY_ADDS):
        ...     print(sentence)
        Pareto front at 90% sparsity (means over seeds, n ≥ 3), by cost: feather (5 M, 80.0%). ...
    """
    sparse = {key: mine for key, mine in group(rows).items() if mine[0]["method"] != DENSE}
    sentences = []
    for sparsity in sparsities(rows):
        same = {key: mine for key, mine in sparse.items() if key[1] == sparsity}
        n = min(map(len, same.values()))
        if len(same) < 2 or n < MIN_SEEDS:
            continue
        front = _front(same, cost)
        names = [
            f"{key[0]} ({cost.mean(same[key]):.3g} {cost.symbol}, {mean(same[key]):.1f}%)"
            for key in front
        ]
        sentence = (
            f"Pareto front at {percent(sparsity)} sparsity (means over seeds, n ≥ {n}), by cost: "
        )
        sentence += ", ".join(names) + "."
        if len(front) < len(same):
            sentence += " Every other method is matched or exceeded at the same or lower cost."
        close = [
            f"{a[0]} and {b[0]}"
            for a, b in itertools.pairwise(front)
            if not is_significant(paired(same[b], same[a]))
        ]
        if close:
            sentence += f" No significant difference in accuracy: {'; '.join(close)}."
        sentences.append(sentence)
    if len(sentences) > 1:
        names = [f"{label} at {percent(sparsity)}" for label, sparsity in _front(sparse, cost)]
        sentences.append(f"Pareto front over all sparsities (grey): {', '.join(names)}.")
    return sentences


def _front(groups: Groups, cost: Cost) -> list[tuple[str, float]]:
    """Return the labels and sparsities on the Pareto front of the means."""
    keys = {(cost.mean(mine), mean(mine)): key for key, mine in groups.items()}
    return [keys[point] for point in pareto_front(keys)]


def cost_figures(name: str, rows: Sequence[Row], cost: Cost, caption: str) -> list[StudyFigure]:
    """Return the figure of accuracy over cost in a list, empty without sparse networks.

    Args:
        name: file name of the figure, without extension.
        rows: the runs.
        cost: the cost to plot.
        caption: caption of the figure.

    Example:
        >>> row = {"label": "feather", "method": "feather", "sparsity": 0.9, "test_accuracy": 0.5}
        >>> (plotted,) = cost_figures("front", [row | {"macs": 5e6}], MULTIPLY_ADDS, "Accuracy.")
        >>> plotted.figure.axes[0].get_xlabel()
        'multiply-adds per image (millions, log scale)'
        >>> cost_figures("front", [row | {"method": "dense"}], MULTIPLY_ADDS, "Accuracy.")
        []
    """
    return [StudyFigure(name, _plot_over_cost(rows, cost), caption)] if labels(rows) else []


def _plot_over_cost(rows: Sequence[Row], cost: Cost) -> Figure:
    """Plot accuracy over cost, with a curve for each method and the Pareto front in grey."""
    figure, axes = panel(5.2, 4.6)
    groups = group(rows)
    sparse = [mine for (label, _), mine in groups.items() if label != DENSE]
    plot_front(axes, [(cost.mean(mine), mean(mine)) for mine in sparse])
    counts = {
        name: min(len(m) for (label, _), m in groups.items() if label == name)
        for name in labels(rows)
    }
    titles, number = number_of_runs({name: f"{count}" for name, count in counts.items()})
    for i, name in enumerate(labels(rows)):
        found = [groups[name, s] for s in sparsities(rows) if (name, s) in groups]
        axes.errorbar(
            [cost.mean(mine) for mine in found],
            [mean(mine) for mine in found],
            [deviation(accuracies(mine)) for mine in found],
            [deviation([cost.of(row) for row in mine]) for mine in found],
            label=plain(titles[name]),
            **line_style(i),
        )
    format_cost_axis(axes, cost)
    axes.set_ylabel(f"test accuracy (%){number}")
    label_lines(axes)
    return figure


def plot_front(axes: Axes, points: Sequence[Point]) -> None:
    """Plot the Pareto front of some points as grey steps.

    Args:
        axes: the axes to plot on.
        points: (cost, accuracy) pairs, at least one.

    Example:
        >>> figure, axes = panel(5.2, 4.6)
        >>> plot_front(axes, [(1.0, 50.0), (2.0, 40.0), (3.0, 60.0)])
        >>> axes.get_lines()[0].get_xdata().tolist()
        [1.0, 3.0]
    """
    front = pareto_front(points)
    x, y = zip(*front, strict=True)
    axes.step(x, y, where="post", color=GREY, alpha=0.35, linewidth=6, zorder=0)


def format_cost_axis(axes: Axes, cost: Cost) -> None:
    """Give the horizontal axis a log scale with plain numbers and the cost's label.

    Args:
        axes: the axes to change.
        cost: the cost that they show.

    Example:
        >>> figure, axes = panel(5.2, 4.6)
        >>> format_cost_axis(axes, MILLISECONDS)
        >>> axes.get_xscale(), axes.get_xlabel()
        ('log', 'latency per image (ms, log scale)')
    """
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(cost.axis)

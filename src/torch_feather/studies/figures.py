"""The pictures that several studies draw: one panel each, as wide as a phone shows well."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..analysis.plots import GREY, look, panel
from ..training.config import DENSE
from .grid import Row
from .published import Series
from .spread import accuracies, deviation, group, labels, mean, percent, sparsities

BROAD = 24  # letters of a legend's entry, above which there is no room for two side by side


def over_sparsity(rows: Sequence[Row]) -> Figure:
    """Accuracy over sparsity: means over seeds, bars of one standard deviation."""
    groups, names, places = group(rows), labels(rows), sparsities(rows)
    figure, axes = panel(5.2, 4.2)
    for i, name in enumerate(names):
        at = [x for x, s in enumerate(places) if (name, s) in groups]
        found = [groups[name, places[x]] for x in at]
        aside = 0.08 * (i - (len(names) - 1) / 2) * min(1, 6 / len(names))
        axes.errorbar(
            [x + aside for x in at],
            [mean(mine) for mine in found],
            [deviation(accuracies(mine)) for mine in found],
            capsize=2.5,
            label=f"{name} (n={_count(found)})",
            **look(i),
        )
    _dense_line(axes, rows)
    axes.set_xticks(range(len(places)), [percent(s) for s in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set(xlabel="weights that are zero", ylabel="test accuracy, %")
    below(axes)
    return figure


def over_epochs(
    series: Mapping[str, Sequence[Sequence[float | None]]], ylabel: str, n: bool = True
) -> Figure:
    """Curves over epochs: means over seeds, bands of one standard deviation.

    Args:
        series: label to a curve for each seed, None where there is no value.
        ylabel: what is drawn.
        n: whether the legend states the number of curves.
    """
    figure, axes = panel(5.2, 4.2)
    for i, (name, curves) in enumerate(series.items()):
        points = [
            (epoch, statistics.mean(seen), deviation(seen))
            for epoch, values in enumerate(zip(*curves, strict=True), 1)
            if (seen := [value for value in values if value is not None])
        ]
        style = look(i) | {"marker": ""}
        label = f"{name} (n={len(curves)})" if n else name
        axes.plot([e for e, _, _ in points], [m for _, m, _ in points], label=label, **style)
        axes.fill_between(
            [e for e, _, _ in points],
            [m - s for _, m, s in points],
            [m + s for _, m, s in points],
            color=style["color"],
            alpha=0.18,
            linewidth=0,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel=ylabel)
    below(axes)
    return figure


def every_seed(rows: Sequence[Row], sparsity: float) -> Figure:
    """Each run a dot, the mean a stroke, the best on top."""
    found = [(label, mine) for (label, s), mine in group(rows).items() if s == sparsity]
    found = sorted(((m, r) for m, r in found if m != DENSE), key=lambda item: mean(item[1]))
    figure, axes = panel(5.2, 1.1 + 0.32 * len(found))
    for y, (_, mine) in enumerate(found):
        dots = accuracies(mine)
        axes.plot(dots, [y] * len(dots), "o", color=look(0)["color"], alpha=0.6, mew=0, ms=6)
        axes.plot(mean(mine), y, "|", color="black", ms=15, mew=1.8)
    _dense_line(axes, rows, vertical=True)
    axes.set_yticks(range(len(found)), [f"{m}  (n={len(r)})" for m, r in found])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlabel("test accuracy, %")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    return figure


def looks(published: Sequence[Series], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of published series: the looks that ours of the same method has, or else what is left."""
    ours = labels(rows)
    free = itertools.count(len(ours))
    found = []
    for series in published:
        same = [i for i, label in enumerate(ours) if label.split(" (")[0] == series.ours]
        found.append(look(same[0] if len(same) == 1 else next(free)))
    return found


def below(axes: Axes) -> None:
    """The legend under the axes, where it covers nothing."""
    handles, names = axes.get_legend_handles_labels()
    figure = axes.figure
    assert isinstance(figure, Figure)
    columns = 2 if max(map(len, names), default=0) <= BROAD else 1
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.2
    )


def _dense_line(axes: Axes, rows: Sequence[Row], vertical: bool = False) -> None:
    dense = [row for row in rows if row["method"] == DENSE]
    if dense:
        style: dict[str, Any] = {"color": GREY, "linestyle": (0, (6, 3)), "linewidth": 1}
        label = f"dense (n={len(dense)})"
        draw, band = (axes.axvline, axes.axvspan) if vertical else (axes.axhline, axes.axhspan)
        draw(mean(dense), label=label, **style)
        away = deviation(accuracies(dense))
        band(mean(dense) - away, mean(dense) + away, color=GREY, alpha=0.15, linewidth=0)


def _count(groups: Sequence[Sequence[Row]]) -> str:
    counts = sorted({len(mine) for mine in groups})
    return "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))

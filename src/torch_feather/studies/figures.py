"""Figures that several studies plot: one pair of axes each, narrow enough for a phone."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..analysis.plots import GREY, line_style, panel, plain
from ..training.config import DENSE
from .metric import ACCURACY, Metric
from .published import Series
from .runs import Row
from .study import StudyFigure
from .summary import accuracies, deviation, group, labels, mean, percent, sparsities

LABEL_SIZE = 8  # points; of the labels at the ends of lines
LABEL_WIDTH = 17  # characters above which a label has two rows

ACCURACY_CAPTION = "{name} after the last epoch: mean over seeds; bars: ± one standard deviation."


def accuracy_figure(rows: Sequence[Row], metric: Metric = ACCURACY) -> list[StudyFigure]:
    """Return the figure of accuracy over sparsity in a list, empty without sparse networks.

    Args:
        rows: the runs.
        metric: the number to plot.

    Example:
        >>> row = {"label": "feather", "method": "feather", "sparsity": 0.9, "test_accuracy": 0.5}
        >>> [figure.name for figure in accuracy_figure([row])]
        ['accuracy']
    """
    if not labels(rows):
        return []
    caption = ACCURACY_CAPTION.format(name=metric.name.capitalize())
    return [StudyFigure("accuracy", plot_over_sparsity(rows, metric), caption)]


def loss_figure(rows: Sequence[Row]) -> list[StudyFigure]:
    """Return the figure of training loss over epochs at the highest sparsity, in a list.

    The list is empty without sparse networks.

    Args:
        rows: the runs.

    Example:
        >>> row = {"label": "feather", "method": "feather", "curve": {"train_loss": [2.0, 1.0]}}
        >>> loss_figure([row | {"sparsity": s} for s in (0.9, 0.98)])[0].caption
        'Training loss at 98% sparsity: mean over seeds; bands: ± one standard deviation.'
    """
    if not labels(rows):
        return []
    highest = sparsities(rows)[-1]
    losses: dict[str, list[list[float | None]]] = {}
    for row in rows:
        if row["method"] != DENSE and row["sparsity"] == highest:
            losses.setdefault(row["label"], []).append(row["curve"]["train_loss"])
    return [
        StudyFigure(
            "loss",
            plot_over_epochs(losses, f"training loss at {percent(highest)}"),
            f"Training loss at {percent(highest)} sparsity: mean over seeds; bands: ± one standard "
            "deviation.",
        )
    ]


def seed_figures(rows: Sequence[Row]) -> list[StudyFigure]:
    """Return a figure for each sparsity with the accuracy of every run.

    Args:
        rows: the runs.

    Example:
        >>> row = {"label": "feather", "method": "feather", "test_accuracy": 0.5}
        >>> [figure.name for figure in seed_figures([row | {"sparsity": s} for s in (0.9, 0.98)])]
        ['seeds-90', 'seeds-98']
    """
    return [
        StudyFigure(
            f"seeds-{100 * sparsity:g}",
            plot_seeds(rows, sparsity),
            f"Test accuracy at {percent(sparsity)} sparsity: one dot per seed; vertical strokes: "
            "means; dashed: dense.",
        )
        for sparsity in sparsities(rows)
    ]


def plot_over_sparsity(rows: Sequence[Row], metric: Metric = ACCURACY) -> Figure:
    """Plot accuracy over sparsity: means over seeds, bars of one standard deviation.

    Args:
        rows: the runs. Dense runs are a horizontal line.
        metric: the number to plot.

    Example:
        >>> row = {"label": "feather", "method": "feather", "sparsity": 0.9, "test_accuracy": 0.5}
        >>> axes = plot_over_sparsity([row, row | {"sparsity": 0.98}]).axes[0]
        >>> [tick.get_text() for tick in axes.get_xticklabels()]
        ['90%', '98%']
    """
    groups, names, ticks = group(rows), labels(rows), sparsities(rows)
    counts = {
        name: _count([groups[name, s] for s in ticks if (name, s) in groups]) for name in names
    }
    dense = [row for row in rows if row["method"] == DENSE]
    titles, number = number_of_runs(counts | ({DENSE: f"{len(dense)}"} if dense else {}))
    figure, axes = panel(5.2, 4.2)
    for i, name in enumerate(names):
        at = [x for x, s in enumerate(ticks) if (name, s) in groups]
        found = [groups[name, ticks[x]] for x in at]
        offset = 0.08 * (i - (len(names) - 1) / 2) * min(1, 6 / len(names))
        axes.errorbar(
            [x + offset for x in at],
            [metric.mean(mine) for mine in found],
            [deviation(metric.values(mine)) for mine in found],
            capsize=2.5,
            label=plain(titles[name]),
            **line_style(i),
        )
    _plot_dense(axes, dense, titles.get(DENSE, ""), metric=metric)
    axes.set_xticks(range(len(ticks)), [percent(s) for s in ticks])
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.set(xlabel="sparsity", ylabel=f"{metric.heading}{number}")
    label_lines(axes)
    return figure


def plot_over_epochs(series: Mapping[str, Sequence[Sequence[float | None]]], ylabel: str) -> Figure:
    """Plot curves over epochs: means over seeds, bands of one standard deviation.

    Args:
        series: label to one curve for each seed, None for missing values.
        ylabel: label of the vertical axis.

    Example:
        >>> two_seeds = [[2.0, 1.0], [2.5, 1.5]]
        >>> axes = plot_over_epochs({"feather": two_seeds}, "training loss").axes[0]
        >>> line = axes.get_lines()[0]
        >>> line.get_label(), line.get_ydata().tolist(), axes.get_ylabel()
        ('feather', [2.25, 1.25], 'training loss, n = 2')
    """
    titles, number = number_of_runs({name: f"{len(curves)}" for name, curves in series.items()})
    figure, axes = panel(5.2, 4.2)
    for i, (name, curves) in enumerate(series.items()):
        points = [
            (epoch, statistics.mean(found), deviation(found))
            for epoch, values in enumerate(zip(*curves, strict=True), 1)
            if (found := [value for value in values if value is not None])
        ]
        style = line_style(i) | {"marker": ""}
        means = [m for _, m, _ in points]
        axes.plot([e for e, _, _ in points], means, label=plain(titles[name]), **style)
        axes.fill_between(
            [e for e, _, _ in points],
            [m - s for _, m, s in points],
            [m + s for _, m, s in points],
            color=style["color"],
            alpha=0.18,
            linewidth=0,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel=ylabel + number)
    label_lines(axes)
    return figure


def plot_seeds(rows: Sequence[Row], sparsity: float) -> Figure:
    """Plot the accuracy of each run as a dot and means as strokes, the highest mean on top.

    Args:
        rows: the runs.
        sparsity: the sparsity to plot.

    Example:
        >>> row = {"label": "feather", "method": "feather", "sparsity": 0.9, "test_accuracy": 0.5}
        >>> other = {"label": "gmp", "method": "gmp", "sparsity": 0.9, "test_accuracy": 0.4}
        >>> axes = plot_seeds([row, row, other], sparsity=0.9).axes[0]
        >>> [tick.get_text() for tick in axes.get_yticklabels()]  # upwards
        ['gmp  (n=1)', 'feather  (n=2)']
    """
    found = [(label, mine) for (label, s), mine in group(rows).items() if s == sparsity]
    found = sorted(((m, r) for m, r in found if m != DENSE), key=lambda item: mean(item[1]))
    figure, axes = panel(5.2, 1.1 + 0.32 * len(found))
    for y, (_, mine) in enumerate(found):
        dots, color = accuracies(mine), line_style(0)["color"]
        axes.plot(dots, [y] * len(dots), "o", color=color, alpha=0.6, mew=0, ms=6)
        axes.plot(mean(mine), y, "|", color="black", ms=15, mew=1.8)
    _plot_dense(axes, [row for row in rows if row["method"] == DENSE], vertical=True)
    axes.set_yticks(range(len(found)), [plain(f"{m}  (n={len(r)})") for m, r in found])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlabel("test accuracy (%)")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    return figure


def published_styles(published: Sequence[Series], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return line styles for published series.

    A series has the style of the study's runs of the same method, if exactly one label is of that
    method, and otherwise an unused style.

    Args:
        published: the series.
        rows: the study's runs.

    Returns:
        Keywords of matplotlib for each series, see `line_style`.

    Example:
        >>> rows = [{"label": "gmp", "method": "gmp"}, {"label": "feather", "method": "feather"}]
        >>> series = [Series("Feather", "feather", "", ()), Series("STR", "str", "", ())]
        >>> published_styles(series, rows) == [line_style(1), line_style(2)]
        True
    """
    own = labels(rows)
    unused = itertools.count(len(own))
    found = []
    for series in published:
        same = [i for i, label in enumerate(own) if label.split(" (")[0] == series.method]
        found.append(line_style(same[0] if len(same) == 1 else next(unused)))
    return found


def label_lines(axes: Axes) -> None:
    """Write the label of each line at the height of its right end, beside the axes.

    Labels that would overlap move apart; a line of the same colour leads from each label to its
    end. Long labels have two rows.

    Args:
        axes: the axes of a figure from `panel`, with labelled lines and final limits.

    Example:
        >>> figure, axes = panel(5.2, 4.2)
        >>> for name in ("feather", "gmp", "st3"):
        ...     _ = axes.plot([0, 1], [0, 1], label=name)
        >>> label_lines(axes)
        >>> [text.get_text() for text in axes.texts]  # downwards
        ['feather', 'gmp', 'st3']
        >>> heights = [text.xyann[1] for text in axes.texts]
        >>> all(a - b > 0.03 for a, b in zip(heights, heights[1:]))
        True
    """
    handles, names = axes.get_legend_handles_labels()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = []
    for handle, name in zip(handles, names, strict=True):
        line = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
        assert isinstance(line, Line2D)
        points = np.asarray(line.get_xydata())
        x, y = to_axes.transform(points[points[:, 0].argmax()])
        if line.get_transform() != axes.transData:
            x = 1.0  # it crosses the whole axes, in their coordinates
        if len(name) > LABEL_WIDTH:
            name = name.replace(" (", "\n(").replace(" = ", "=")
        ends.append((y, x, name, line.get_color()))
    ends.sort(key=lambda end: -end[0])
    figure = axes.figure
    assert isinstance(figure, Figure)
    row = 1.25 * LABEL_SIZE / 72 / (figure.get_figheight() * 0.84)
    sizes = [row * (1 + label.count("\n")) for _, _, label, _ in ends]
    heights = spread([y for y, _, _, _ in ends], sizes)
    for (y, x, label, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            (min(x, 1.0), y),
            (1.035, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=LABEL_SIZE,
            va="center",
            linespacing=1.0,
            arrowprops={
                **{"arrowstyle": "-", "color": colour, "alpha": 0.7, "linewidth": 1},
                **{"shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
            },
        )


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Return the centres of labels that do not overlap, near the wanted ones.

    Args:
        wanted: centres in descending order, in units of the axes' height.
        sizes: height of each label in the same unit.

    Returns:
        Centres in descending order, within 0 and 1 if there is room.

    Example:
        >>> [round(centre, 2) for centre in spread([0.5, 0.5, 0.1], [0.1, 0.1, 0.1])]
        [0.55, 0.45, 0.1]
    """
    groups: list[tuple[list[int], float]] = []  # labels that touch, and the top of the first
    for i, centre in enumerate(wanted):
        groups.append(([i], centre + sizes[i] / 2))
        while len(groups) > 1:
            (above, top), (below, lower) = groups[-2:]
            if top - sum(sizes[j] for j in above) >= lower:
                break
            together = above + below
            offsets = itertools.accumulate([0.0, *(sizes[j] for j in together[:-1])])
            middle = [wanted[j] + o + sizes[j] / 2 for j, o in zip(together, offsets, strict=True)]
            groups[-2:] = [(together, min(1.0, statistics.mean(middle)))]
    found = []
    for members, top in groups:
        height = sum(sizes[j] for j in members)
        top = max(top, height)
        for j in members:
            found.append(top - sizes[j] / 2)
            top -= sizes[j]
    return found


def number_of_runs(counts: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return a title for each series, and a suffix for the label of the vertical axis.

    The number of runs is in the suffix if all series have the same, and otherwise in the titles.

    Args:
        counts: number of runs for each series, such as "3", or "2–3" if its points differ.

    Example:
        >>> number_of_runs({"feather": "3", "gmp": "3"})
        ({'feather': 'feather', 'gmp': 'gmp'}, ', n = 3')
        >>> number_of_runs({"feather": "3", "gmp": "2"})
        ({'feather': 'feather (n=3)', 'gmp': 'gmp (n=2)'}, '')
    """
    if len(different := set(counts.values())) == 1:
        return {name: name for name in counts}, f", n = {different.pop()}"
    return {name: f"{name} (n={count})" for name, count in counts.items()}, ""


def _plot_dense(
    axes: Axes,
    dense: Sequence[Row],
    label: str = "",
    vertical: bool = False,
    metric: Metric = ACCURACY,
) -> None:
    if dense:
        style: dict[str, Any] = {"color": GREY, "linestyle": (0, (6, 3)), "linewidth": 1}
        line, band = (axes.axvline, axes.axvspan) if vertical else (axes.axhline, axes.axhspan)
        line(metric.mean(dense), label=plain(label), **style)
        middle, width = metric.mean(dense), deviation(metric.values(dense))
        band(middle - width, middle + width, color=GREY, alpha=0.15, linewidth=0)


def _count(groups: Sequence[Sequence[Row]]) -> str:
    counts = sorted({len(mine) for mine in groups})
    return "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))

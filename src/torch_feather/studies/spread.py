"""Means over seeds, how far they are to be trusted, and tables and sentences of them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from ..training.config import DENSE
from .grid import Row
from .study import Table

ENOUGH = 3  # seeds without which no conclusion is drawn

Groups = dict[tuple[str, float], list[Row]]


def group(rows: Iterable[Row]) -> Groups:
    """Rows by label and sparsity, in the order of the plan."""
    groups: Groups = defaultdict(list)
    for row in rows:
        groups[row["label"], row["sparsity"]].append(row)
    return dict(groups)


def labels(rows: Iterable[Row]) -> list[str]:
    """What there is to compare, in the order of the plan; the dense network is not among it."""
    return list(dict.fromkeys(row["label"] for row in rows if row["method"] != DENSE))


def sparsities(rows: Iterable[Row]) -> list[float]:
    """Of the sparse runs, rising."""
    return sorted({row["sparsity"] for row in rows if row["method"] != DENSE})


def accuracies(rows: Iterable[Row]) -> list[float]:
    """Test accuracy in %."""
    return [100 * row["test_accuracy"] for row in rows]


def mean(rows: Sequence[Row]) -> float:
    """Test accuracy in %, over seeds."""
    return statistics.mean(accuracies(rows))


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def with_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def percent(share: float) -> str:
    """0.995 as 99.5 %."""
    return f"{100 * share:g} %"


Column = tuple[str, Callable[[Sequence[Row]], str]]


def accuracy_table(
    rows: Sequence[Row], caption: str = "Test accuracy", more: Sequence[Column] = ()
) -> Table:
    """Mean ± standard deviation of test accuracy for each label and sparsity, the best first."""
    groups = sorted(group(rows).items(), key=lambda item: (item[0][1], -mean(item[1])))
    head = ["", "sparsity", "test accuracy, %", "n", "zeros / weights", "by itself"]
    lines = []
    for (label, sparsity), found in groups:
        zeros = " or ".join(f"{z:,}" for z in sorted({row["zeros"] for row in found}))
        lines.append(
            [
                label,
                "" if label == DENSE else percent(sparsity),
                with_spread(accuracies(found)),
                str(len(found)),
                f"{zeros} / {found[0]['weights']:,}",
                _by_itself(found),
                f"{statistics.mean(row['macs'] for row in found) / 1e6:.2f}",
                *(text(found) for _, text in more),
            ]
        )
    head += ["multiply-adds, M", *(name for name, _ in more)]
    if not any(line[5] for line in lines):
        del head[5]
        lines = [[*line[:5], *line[6:]] for line in lines]
    return Table(caption, head, lines)


def _by_itself(rows: Sequence[Row]) -> str:
    """The sparsity that a method had before its last step made it exact, where it differs."""
    own = [row["own_sparsity"] for row in rows]
    exact = [round(100 * row["zeros"] / row["weights"], 2) for row in rows]
    if None in own or [round(100 * share, 2) for share in own] == exact:
        return ""
    return f"{100 * statistics.mean(own):.2f} %"


def paired(ours: Sequence[Row], others: Sequence[Row]) -> list[float]:
    """How many points the one is ahead of the other, seed by seed."""
    other = {row["seed"]: row for row in others}
    both = [row for row in ours if row["seed"] in other]
    return [100 * (row["test_accuracy"] - other[row["seed"]]["test_accuracy"]) for row in both]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % confidence interval of the mean."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def against(rows: Sequence[Row], pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[Table]]:
    """How far the first of each pair is ahead of the second: a sentence each, and the numbers.

    Ahead means that the 95 % interval of the paired difference is above 0. Without enough seeds
    nothing is said.
    """
    groups, sentences, lines = group(rows), [], []
    for ours, other in pairs:
        where: dict[str, list[str]] = {}
        fewest = []
        for sparsity in sparsities(rows):
            ahead = paired(groups.get((ours, sparsity), []), groups.get((other, sparsity), []))
            if len(ahead) < ENOUGH:
                continue
            low, high = interval(ahead)
            verdict = "ahead of" if low > 0 else "behind" if high < 0 else "not told apart from"
            where.setdefault(verdict, []).append(f"{100 * sparsity:g}")
            fewest.append(len(ahead))
            by = f"{statistics.mean(ahead):+.2f}"
            span = f"{low:+.2f} to {high:+.2f}"
            lines.append([f"{ours} against {other}", percent(sparsity), by, span, str(len(ahead))])
        if where:
            told = "; ".join(f"{verdict} {other} at {_and(at)} %" for verdict, at in where.items())
            sentences.append(f"{ours} is {told} sparsity (n = {min(fewest)}).")
    head = ["", "sparsity", "points of accuracy", "95 % interval", "n"]
    caption = (
        "Differences, seed by seed, with Student's interval of their mean. "
        "Not told apart: 0 is in the interval"
    )
    return sentences, [Table(caption, head, lines)] if lines else []


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))

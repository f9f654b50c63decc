"""Means over seeds, how far they are to be trusted, and tables and sentences of them."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..training.config import DENSE
from .grid import Row
from .study import Table

ENOUGH = 3  # seeds without which no conclusion is drawn
NAMED = 4  # differences that a sentence names; of more the table tells

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


def millions(number: float) -> str:
    """1234567 as 1.23, and 123456 as 0.123."""
    return f"{number / 1e6:.{2 if number >= 1e6 else 3}f}"


Column = tuple[str, Callable[[Sequence[Row]], str]]


def accuracy_table(
    rows: Sequence[Row], caption: str = "Test accuracy", more: Sequence[Column] = ()
) -> Table:
    """Mean ± standard deviation of test accuracy for each label and sparsity, the best first."""
    groups = sorted(group(rows).items(), key=lambda item: (item[0][1], -mean(item[1])))
    head = ["", "sparsity", "test accuracy, %", "n", "zeros / weights", "before the exact end"]
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
                millions(statistics.mean(row["macs"] for row in found)),
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


def paired(
    ours: Sequence[Row],
    others: Sequence[Row],
    value: Callable[[Row], float] = lambda row: 100 * row["test_accuracy"],
) -> list[float]:
    """How far the one is ahead of the other, seed by seed; in points of accuracy."""
    other = {row["seed"]: row for row in others}
    both = [row for row in ours if row["seed"] in other]
    return [value(row) - value(other[row["seed"]]) for row in both]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % confidence interval of the mean."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def apart(values: Sequence[float]) -> bool:
    """Whether 0 is outside of the interval."""
    low, high = interval(values)
    return low > 0 or high < 0


def chance(values: Sequence[float]) -> float:
    """Student's two-sided p of a mean this far from 0, if it were 0."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(values, 0).pvalue)


def holm(chances: Sequence[float]) -> list[float]:
    """Corrected for how many there are (Holm, Scandinavian Journal of Statistics, 1979)."""
    corrected, highest = [0.0] * len(chances), 0.0
    for rank, i in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[i]))
        corrected[i] = highest
    return corrected


@dataclass(frozen=True)
class Difference:
    """Of two labels at one sparsity, seed by seed."""

    ours: str
    other: str
    sparsity: float
    values: tuple[float, ...]

    @property
    def judged(self) -> bool:
        """Whether the seeds say how far chance goes; with few test images all may be equal."""
        return statistics.stdev(self.values) > 1e-9

    @property
    def verdict(self) -> str:
        """Taken by itself."""
        low, high = interval(self.values)
        return "ahead of" if low > 0 else "behind" if high < 0 else "not told apart from"


def against(rows: Sequence[Row], pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[Table]]:
    """How far the first of each pair is ahead of the second: a sentence each, and the numbers.

    Ahead means that the 95 % interval of the paired difference is above 0. Without enough seeds
    nothing is said. The last sentence says what is left if one corrects for how many there are at
    a sparsity.
    """
    groups, found = group(rows), []
    for (ours, other), sparsity in itertools.product(pairs, sparsities(rows)):
        ahead = paired(groups.get((ours, sparsity), []), groups.get((other, sparsity), []))
        if len(ahead) >= ENOUGH:
            found.append(Difference(ours, other, sparsity, tuple(ahead)))
    judged = [difference for difference in found if difference.judged]
    corrected: dict[Difference, float] = {}
    for sparsity in sparsities(rows):
        mine = [d for d in judged if d.sparsity == sparsity]
        corrected |= zip(mine, holm([chance(d.values) for d in mine]), strict=True)
    head = ["", "sparsity", "points of accuracy", "95 % interval", "p (Holm)", "n"]
    caption = (
        "Differences, seed by seed, with Student's interval of their mean, each taken by itself: "
        "not told apart means that 0 is in it. p is corrected for how many there are at a sparsity "
        "on this page"
    )
    table = Table(caption, head, [_line(d, corrected.get(d)) for d in found])
    return _sentences(judged, corrected), [table] if found else []


def _line(difference: Difference, p: float | None) -> list[str]:
    values = difference.values
    told = ["–", "–"]
    if p is not None:
        low, high = interval(values)
        told = [f"{low:+.2f} to {high:+.2f}", f"{p:.3f}" if p >= 0.001 else "< 0.001"]
    pair = f"{difference.ours} against {difference.other}"
    mean_of = f"{statistics.mean(values):+.2f}"
    return [pair, percent(difference.sparsity), mean_of, *told, str(len(values))]


def _sentences(judged: Sequence[Difference], corrected: Mapping[Difference, float]) -> list[str]:
    # Of whom the same is to be said: by whom, and verdicts with sparsities and the fewest seeds.
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for (ours, other), pair in itertools.groupby(judged, lambda d: (d.ours, d.other)):
        mine = list(pair)
        where: dict[str, list[str]] = defaultdict(list)
        for difference in mine:
            where[difference.verdict].append(f"{100 * difference.sparsity:g}")
        told = tuple((verdict, _and(at)) for verdict, at in where.items())
        alike[ours, told, min(len(d.values) for d in mine)].append(other)
    sentences = []
    for (ours, told, n), others in alike.items():
        where_to = "; ".join(f"{verdict} {_and(others)} at {at} %" for verdict, at in told)
        sentences.append(f"{ours} is {where_to} sparsity (n = {n}).")
    told_apart = [d for d in judged if d.verdict != "not told apart from"]
    if len(judged) > 1 and told_apart:
        left = [d for d in told_apart if corrected[d] < 0.05]
        lost = [d for d in told_apart if d not in left]
        few = min(len(left), len(lost)) <= NAMED
        which = f": {_named(left)}" if 0 < len(left) <= len(lost) and few else ""
        but = f", all but {_named(lost)}" if 0 < len(lost) < len(left) and few else ""
        if len(told_apart) == 1:
            what = f"The one difference told apart {'remains' if left else 'does not remain'}"
        else:
            remain = "remains" if len(left) == 1 else "remain"
            what = f"Of the {len(told_apart)} differences told apart, {len(left)} {remain}"
        sentences.append(
            f"Each comparison is taken by itself. {what} when corrected for how many there "
            f"are at a sparsity (Holm){which}{but}."
        )
    return sentences


def _named(differences: Sequence[Difference]) -> str:
    pairs = itertools.groupby(differences, lambda d: (d.ours, d.other))
    return "; ".join(
        f"{ours} against {other} at {_and([f'{100 * d.sparsity:g}' for d in mine])} %"
        for (ours, other), mine in pairs
    )


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))

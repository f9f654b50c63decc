"""Paired comparisons over seeds: intervals, p values, and the sentences and tables about them."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .metric import ACCURACY, Metric
from .runs import Row
from .study import Table
from .summary import group, join, percent, sparsities

MIN_SEEDS = 3  # seeds below which no conclusion is drawn
MAX_NAMED = 4  # differences that a sentence names; more are left to the table

Pair = tuple[str, str]

CAPTION = (
    "Paired differences in {what} with uncorrected 95% t intervals. An "
    "interval that contains 0 means no significant difference. p values are Holm-corrected over "
    "{family}."
)
FAMILIES = {False: "the comparisons at the same sparsity", True: "all comparisons"}


def paired(
    first: Sequence[Row],
    second: Sequence[Row],
    value: Callable[[Row], float] = ACCURACY.of,
) -> list[float]:
    """Return the differences first − second for each seed that both have.

    Args:
        first: runs of one label.
        second: runs of another label.
        value: number to compare; by default test accuracy in %.

    Returns:
        One difference per common seed, in the order of `first`; percentage points by default.

    Example:
        >>> first = [{"seed": 0, "test_accuracy": 0.5}, {"seed": 1, "test_accuracy": 0.75}]
        >>> second = [{"seed": 1, "test_accuracy": 0.5}, {"seed": 2, "test_accuracy": 0.25}]
        >>> paired(first, second)
        [25.0]
    """
    by_seed = {row["seed"]: row for row in second}
    both = [row for row in first if row["seed"] in by_seed]
    return [value(row) - value(by_seed[row["seed"]]) for row in both]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% t interval of the mean.

    Args:
        values: at least two numbers.

    Example:
        >>> low, high = interval([1.0, 2.0, 3.0])
        >>> round(low, 2), round(high, 2)
        (-0.48, 4.48)
    """
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def is_significant(values: Sequence[float]) -> bool:
    """Return whether the 95% t interval of the mean excludes 0.

    Args:
        values: at least two numbers, such as paired differences.

    Example:
        >>> is_significant([1.0, 2.0, 3.0]), is_significant([1.9, 2.0, 2.1])
        (False, True)
    """
    low, high = interval(values)
    return low > 0 or high < 0


def p_value(values: Sequence[float]) -> float:
    """Return the two-sided p value of a t test against a mean of 0.

    Args:
        values: at least two numbers.

    Example:
        >>> round(p_value([1.0, 2.0, 3.0]), 3)
        0.074
    """
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(values, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm-corrected p values (Holm, Scandinavian Journal of Statistics, 1979).

    Args:
        p_values: uncorrected p values of one family, in any order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


@dataclass(frozen=True)
class _Difference:
    """Paired differences first − second of two labels at one sparsity.

    Attributes:
        first: label of the minuend.
        second: label of the subtrahend.
        sparsity: their sparsity.
        values: difference of each seed.
    """

    first: str
    second: str
    sparsity: float
    values: tuple[float, ...]

    @property
    def pair(self) -> Pair:
        """Both labels."""
        return self.first, self.second

    @property
    def varies(self) -> bool:
        """Whether the differences vary over seeds, so that an interval exists.

        With few test images, all seeds can give the same difference.
        """
        return statistics.stdev(self.values) > 1e-9

    @property
    def direction(self) -> str | None:
        """Whether the first label is significantly "above" or "below" the second, uncorrected."""
        low, high = interval(self.values)
        return "above" if low > 0 else "below" if high < 0 else None

    def interval_text(self, metric: Metric) -> str:
        """Format mean, 95% interval and number of seeds."""
        low, high = map(metric.signed, interval(self.values))
        mean, n = metric.signed(statistics.mean(self.values)), len(self.values)
        return f"{mean} {metric.points}; 95% CI {low} to {high}; n = {n}"


def compare_pairs(
    rows: Sequence[Row],
    pairs: Iterable[Pair],
    *,
    together: bool = False,
    metric: Metric = ACCURACY,
) -> tuple[list[str], list[Table]]:
    """Compare labels pairwise at each sparsity.

    A difference is significant if the 95% t interval of the paired differences excludes 0. Pairs
    with fewer than `MIN_SEEDS` common seeds are left out.

    Args:
        rows: the runs.
        pairs: first and second label of each comparison.
        together: correct p values over all comparisons instead of those at the same sparsity.
        metric: the number to compare.

    Returns:
        Sentences with the uncorrected results, the last one with the Holm-corrected result; and a
        list of one table with all numbers, empty without comparisons.

    Example:
        >>> rows = [
        ...     {"method": m, "label": m, "sparsity": 0.9, "seed": seed, "test_accuracy": accuracy}
        ...     for m, accuracies in (("feather", (0.9, 0.91, 0.92)), ("gmp", (0.8, 0.811, 0.822)))
        ...     for seed, accuracy in enumerate(accuracies)
        ... ]
        >>> sentences, tables = compare_pairs(rows, [("feather", "gmp")])
        >>> sentences
        ['feather is significantly above gmp at 90% sparsity (n = 3).']
        >>> tables[0].rows
        [['feather vs. gmp', '90%', '+9.90', '+9.65 to +10.15', '< 0.001', '3']]
    """
    groups, found = group(rows), []
    for (first, second), sparsity in itertools.product(pairs, sparsities(rows)):
        minuends, subtrahends = (groups.get((label, sparsity), []) for label in (first, second))
        values = paired(minuends, subtrahends, metric.of)
        if len(values) >= MIN_SEEDS:
            found.append(_Difference(first, second, sparsity, tuple(values)))
    tested = [difference for difference in found if difference.varies]
    corrected: dict[_Difference, float] = {}
    families = [tested]
    if not together:
        families = [[d for d in tested if d.sparsity == s] for s in sparsities(rows)]
    for same in families:
        corrected |= zip(same, holm([p_value(d.values) for d in same]), strict=True)
    corrected = {difference: corrected[difference] for difference in tested}
    head = ["comparison", "sparsity", f"difference ({metric.points})", "95% CI", "p (Holm)", "n"]
    family = FAMILIES[together]
    what = metric.name + " (percentage points)" * (metric is ACCURACY)
    lines = [_table_row(d, corrected.get(d), metric) for d in found]
    table = Table(CAPTION.format(what=what, family=family), head, lines)
    sentences = [
        *_significant(tested, metric),
        *_not_significant(tested, metric),
        *_after_holm(corrected, family, metric),
    ]
    return sentences, [table] if found else []


def _table_row(difference: _Difference, p: float | None, metric: Metric) -> list[str]:
    values = difference.values
    spread, p_text = "–", "–"
    if p is not None:
        low, high = map(metric.signed, interval(values))
        spread, p_text = f"{low} to {high}", f"{p:.3f}" if p >= 0.001 else "< 0.001"
    name = f"{difference.first} vs. {difference.second}"
    mean = metric.signed(statistics.mean(values))
    return [name, percent(difference.sparsity), mean, spread, p_text, str(len(values))]


def _significant(tested: Sequence[_Difference], metric: Metric) -> list[str]:
    """Return sentences about significant differences, one for all labels with the same result."""
    found: dict[tuple[str, str], dict[str, list[_Difference]]] = {}
    for difference in tested:
        if difference.direction is not None:
            by_second = found.setdefault((difference.first, difference.direction), {})
            by_second.setdefault(difference.second, []).append(difference)
    sentences = []
    for (first, direction), by_second in found.items():
        alike: dict[tuple[str, int], list[str]] = defaultdict(list)
        for second, mine in by_second.items():
            where = join([percent(d.sparsity) for d in mine])
            alike[where, min(len(d.values) for d in mine)].append(second)
        sentences += [
            f"{first} {getattr(metric, direction)} {join(others)} at {where} sparsity (n = {n})."
            for (where, n), others in alike.items()
        ]
    return sentences


def _not_significant(tested: Sequence[_Difference], metric: Metric) -> list[str]:
    """Return a sentence for each pair about its differences that are not significant."""
    found: dict[Pair, list[_Difference]] = defaultdict(list)
    for difference in tested:
        if difference.direction is None:
            found[difference.pair].append(difference)
    sentences = []
    for (first, second), mine in found.items():
        where = [f"{percent(d.sparsity)} ({d.interval_text(metric)})" for d in mine]
        where[0] = where[0].replace(" (", " sparsity (", 1)
        sentences.append(f"{first} and {second}: no significant difference at {join(where)}.")
    return sentences


def _after_holm(corrected: Mapping[_Difference, float], family: str, metric: Metric) -> list[str]:
    """Return a sentence about the significant differences that remain after Holm correction."""
    significant = [d for d in corrected if d.direction is not None]
    if len(corrected) < 2 or not significant:
        return []
    remain = [d for d in significant if corrected[d] < 0.05]
    lost = [d for d in significant if d not in remain]
    few = min(len(remain), len(lost)) <= MAX_NAMED
    names = f": {_names(remain)}" if 0 < len(remain) <= len(lost) and few else ""
    names += f", all except {_names(lost)}" if 0 < len(lost) < len(remain) and few else ""
    total = len(significant)
    if total == 1:
        result = f"the only significant difference {'remains' if remain else 'does not remain'}"
    elif len(remain) == total:
        result = f"{'both' if total == 2 else f'all {total}'} significant differences remain"
    else:
        verb = "remains" if len(remain) == 1 else "remain"
        result = f"{len(remain)} of the {total} significant differences {verb}"
    return [
        f"These differences in {metric.name} are uncorrected. After Holm correction over "
        f"{family}, {result} (p < 0.05){names}."
    ]


def _names(differences: Sequence[_Difference]) -> str:
    pairs = itertools.groupby(differences, lambda d: d.pair)
    return "; ".join(
        f"{first} vs. {second} at {join([percent(d.sparsity) for d in mine])}"
        for (first, second), mine in pairs
    )

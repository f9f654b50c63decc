"""Groups of rows, means and standard deviations over seeds, number formats, accuracy tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from ..training.config import DENSE
from .metric import ACCURACY, Metric
from .runs import Row
from .study import Table

Groups = dict[tuple[str, float], list[Row]]
Column = tuple[str, Callable[[Sequence[Row]], str]]  # heading, text for the rows of a group


def group(rows: Iterable[Row]) -> Groups:
    """Group rows by label and sparsity, in the order of the plan.

    Args:
        rows: the runs.

    Returns:
        The rows of all seeds, by label and sparsity.

    Example:
        >>> rows = [{"label": "gmp", "sparsity": 0.9, "seed": seed} for seed in (0, 1)]
        >>> [(key, len(found)) for key, found in group(rows).items()]
        [(('gmp', 0.9), 2)]
    """
    groups: Groups = defaultdict(list)
    for row in rows:
        groups[row["label"], row["sparsity"]].append(row)
    return dict(groups)


def labels(rows: Iterable[Row]) -> list[str]:
    """Return the labels of the sparse runs in the order of the plan.

    Args:
        rows: the runs.

    Example:
        >>> labels({"label": name, "method": name} for name in ("dense", "gmp", "st3", "gmp"))
        ['gmp', 'st3']
    """
    return list(dict.fromkeys(row["label"] for row in rows if row["method"] != DENSE))


def sparsities(rows: Iterable[Row]) -> list[float]:
    """Return the sparsities of the sparse runs in ascending order.

    Args:
        rows: the runs.

    Example:
        >>> sparsities({"sparsity": s, "method": "gmp"} for s in (0.98, 0.9, 0.98))
        [0.9, 0.98]
    """
    return sorted({row["sparsity"] for row in rows if row["method"] != DENSE})


def accuracies(rows: Iterable[Row]) -> list[float]:
    """Return the test accuracies in %.

    Args:
        rows: the runs.

    Example:
        >>> accuracies([{"test_accuracy": 0.5}, {"test_accuracy": 0.75}])
        [50.0, 75.0]
    """
    return [100 * row["test_accuracy"] for row in rows]


def mean(rows: Sequence[Row]) -> float:
    """Return the mean test accuracy in %.

    Args:
        rows: the runs, at least one.

    Example:
        >>> mean([{"test_accuracy": 0.5}, {"test_accuracy": 0.75}])
        62.5
    """
    return statistics.mean(accuracies(rows))


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; 0 for a single value.

    Args:
        values: at least one number.

    Example:
        >>> deviation([1.0, 2.0, 3.0]), deviation([5.0])
        (1.0, 0.0)
    """
    return statistics.stdev(values) if len(values) > 1 else 0.0


def with_deviation(values: Sequence[float], digits: int = 2) -> str:
    """Format mean ± standard deviation; the mean alone for a single value.

    Args:
        values: at least one number.
        digits: decimals of both.

    Example:
        >>> with_deviation([40.0, 42.0, 44.0])
        '42.00 ± 2.00'
    """
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def percent(fraction: float) -> str:
    """Format a fraction as a percentage.

    Args:
        fraction: 0 to 1.

    Example:
        >>> percent(0.995)
        '99.5%'
    """
    return f"{100 * fraction:g}%"


def millions(number: float) -> str:
    """Format a number in millions with three significant digits.

    Args:
        number: a count, such as multiply-adds.

    Example:
        >>> millions(1234567), millions(123456)
        ('1.23', '0.123')
    """
    return f"{number / 1e6:.{2 if number >= 1e6 else 3}f}"


def signed(number: float) -> str:
    """Format a number with its sign and two decimals.

    Args:
        number: such as a difference in percentage points.

    Example:
        >>> signed(1.5), signed(-1.5)
        ('+1.50', '−1.50')
    """
    return f"{number:+.2f}".replace("-", "−")


def join(words: Sequence[str]) -> str:
    """Join words with commas and a final "and".

    Args:
        words: at least one.

    Example:
        >>> join(["90%", "95%", "99%"])
        '90%, 95% and 99%'
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def threads(count: int) -> str:
    """Format a number of threads.

    Args:
        count: at least 1.

    Example:
        >>> threads(1), threads(2)
        ('1 thread', '2 threads')
    """
    return f"{count} thread{'s' * (count != 1)}"


def accuracy_table(
    rows: Sequence[Row],
    caption: str = "Test accuracy",
    more: Sequence[Column] = (),
    metric: Metric = ACCURACY,
) -> Table:
    """Return a table of mean ± standard deviation for each label and sparsity.

    Args:
        rows: the runs.
        caption: caption of the table.
        more: additional columns.
        metric: the number to show.

    Returns:
        The table, sorted by ascending sparsity, then the best mean first. It has the learned
        sparsity of a method if that differs from the final one.

    Example:
        >>> row = {"label": "gmp", "method": "gmp", "sparsity": 0.9, "learned_sparsity": None}
        >>> row |= {"zeros": 90, "weights": 100, "macs": 2_500_000}
        >>> table = accuracy_table([row | {"test_accuracy": a} for a in (0.5, 0.75)])
        >>> dict(zip(table.head, table.rows[0], strict=True))["test accuracy (%)"]
        '62.50 ± 17.68'
    """
    sign = -1 if metric.higher_is_better else 1
    by = {key: (key[1], sign * metric.mean(found)) for key, found in group(rows).items()}
    groups = sorted(group(rows).items(), key=lambda item: by[item[0]])
    head = ["method", "sparsity", metric.heading, "n", "zeros / weights", "learned sparsity"]
    lines = []
    for (label, sparsity), found in groups:
        zeros = " or ".join(f"{z:,}" for z in sorted({row["zeros"] for row in found}))
        lines.append(
            [
                label,
                "" if label == DENSE else percent(sparsity),
                with_deviation(metric.values(found), metric.digits),
                str(len(found)),
                f"{zeros} / {found[0]['weights']:,}",
                _learned_sparsity(found),
                millions(statistics.mean(row["macs"] for row in found)),
                *(text(found) for _, text in more),
            ]
        )
    head += ["multiply-adds (M)", *(name for name, _ in more)]
    if not any(line[5] for line in lines):
        del head[5]
        lines = [[*line[:5], *line[6:]] for line in lines]
    return Table(caption, head, lines)


def _learned_sparsity(rows: Sequence[Row]) -> str:
    """Return the mean sparsity before final exact-count pruning, if it differs from the final."""
    learned = [row["learned_sparsity"] for row in rows]
    final = [round(100 * row["zeros"] / row["weights"], 2) for row in rows]
    if None in learned or [round(100 * value, 2) for value in learned] == final:
        return ""
    return f"{100 * statistics.mean(learned):.2f}%"

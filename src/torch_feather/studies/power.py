"""The number of seeds that a paired comparison requires, from the spread of recorded runs."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..errors import ConfigurationError
from .comparison import interval, is_significant, paired
from .runs import Row
from .study import Table
from .summary import group, labels, percent, signed, sparsities

POWER = 0.8  # probability of a significant result
ALPHA = 0.05  # two-sided
MOST_SEEDS = 10_000  # above this the search ends
SMALL_EFFECT = 0.5  # points; a smaller difference is of little practical interest here

CAPTION = (
    f"Seeds (n) for {POWER:.0%} power at a two-sided level of {ALPHA:.0%} in a paired t test over "
    f"seeds: for the difference seen, and for a difference of {SMALL_EFFECT} points. SD is the "
    "standard deviation of the paired differences, with its 95% interval: with few seeds it is "
    "uncertain, and n is proportional to its square. 'settled' means that the recorded interval "
    "already excludes 0."
)


def power_of(n: int, effect: float, deviation: float) -> float:
    """Return the power of a two-sided paired t test at a level of 5%.

    Args:
        n: number of pairs, at least 2.
        effect: mean difference.
        deviation: standard deviation of the differences, above 0.

    Example:
        >>> round(power_of(34, effect=0.5, deviation=1.0), 2)
        0.81
    """
    from scipy.stats import nct, t

    quantile = t.ppf(1 - ALPHA / 2, n - 1)
    noncentrality = abs(effect) / deviation * n**0.5
    upper = nct.sf(quantile, n - 1, noncentrality)
    return float(upper + nct.cdf(-quantile, n - 1, noncentrality))


def seeds_for(effect: float, deviation: float) -> int | None:
    """Return the smallest number of seeds that detects a difference with a power of 80%.

    Args:
        effect: mean difference.
        deviation: standard deviation of the paired differences, above 0.

    Returns:
        The number; None if it exceeds `MOST_SEEDS`.

    Example:
        >>> seeds_for(effect=0.5, deviation=1.0)
        34
        >>> seeds_for(effect=0.0, deviation=1.0) is None
        True
    """
    if power_of(MOST_SEEDS, effect, deviation) < POWER:
        return None
    low, high = 1, MOST_SEEDS  # the power rises with n
    while high - low > 1:
        middle = (low + high) // 2
        if power_of(middle, effect, deviation) < POWER:
            low = middle
        else:
            high = middle
    return high


def deviation_interval(deviation: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a standard deviation, for normal values.

    Args:
        deviation: standard deviation of the sample.
        n: its size, at least 2.

    Example:
        >>> low, high = deviation_interval(1.0, 3)
        >>> round(low, 2), round(high, 2)
        (0.52, 6.28)
    """
    from scipy.stats import chi2

    quantiles = chi2.ppf([1 - ALPHA / 2, ALPHA / 2], n - 1)
    low, high = (float(deviation * ((n - 1) / q) ** 0.5) for q in quantiles)
    return low, high


def power_table(rows: Sequence[Row], pairs: Iterable[tuple[str, str]]) -> Table:
    """Return the number of seeds that each comparison requires.

    Args:
        rows: runs of one or several setups (network, data, epochs). Equal runs count once.
        pairs: first and second label of each comparison. Comparisons with less than two common
            seeds, or without variation, are left out.

    Example:
        >>> setup = {"network": "resnet8", "data": "cifar100", "epochs": 10, "sparsity": 0.9}
        >>> rows = [
        ...     setup | {"name": f"{m}-{seed}", "method": m, "label": m, "seed": seed}
        ...     | {"test_accuracy": accuracy}
        ...     for m, accuracies in (("feather", (0.9, 0.91, 0.92)), ("gmp", (0.89, 0.9, 0.92)))
        ...     for seed, accuracy in enumerate(accuracies)
        ... ]
        >>> power_table(rows, [("feather", "gmp")]).rows[0][3:]
        ['+0.67', '0.58 (0.30 to 3.63)', '3', '9', '13']
    """
    head = ["comparison", "setup", "sparsity", "difference (points)", "SD (95% CI)", "seeds now"]
    head += ["n for the difference", f"n for {SMALL_EFFECT} points"]
    pairs, lines = list(pairs), []
    setups: dict[tuple[str, str, str], dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in rows:
        setup = row["network"], row["data"], f"{row['epochs']} epochs"
        setups[setup][row["name"], row["label"]] = row
    for setup, found in setups.items():
        mine = list(found.values())
        groups = group(mine)
        for (first, second), sparsity in itertools.product(pairs, sparsities(mine)):
            both = groups.get((first, sparsity), []), groups.get((second, sparsity), [])
            values = paired(*both)
            if len(values) > 1 and statistics.stdev(values) > 1e-9:
                name = [f"{first} vs. {second}", ", ".join(setup), percent(sparsity)]
                lines.append([*name, *_required(values)])
    return Table(CAPTION, head, lines)


def _required(values: Sequence[float]) -> list[str]:
    mean, deviation, n = statistics.mean(values), statistics.stdev(values), len(values)
    low, high = deviation_interval(deviation, n)
    wanted = [seeds_for(effect, deviation) for effect in (mean, SMALL_EFFECT)]
    texts = [f"above {MOST_SEEDS:,}" if count is None else str(count) for count in wanted]
    if is_significant(values):
        texts[0] = f"settled ({' to '.join(map(signed, interval(values)))})"
    return [signed(mean), f"{deviation:.2f} ({low:.2f} to {high:.2f})", str(n), *texts]


def pairs_of(rows: Sequence[Row], texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs that texts such as `p = 3 vs. p = 2` name.

    Args:
        rows: the runs.
        texts: names of comparisons as in the tables of studies; none for the first sparse label
            with each other one.

    Raises:
        ConfigurationError: a text names no comparison of these runs.

    Example:
        >>> rows = [{"label": label, "method": label} for label in ("dense", "feather", "gmp")]
        >>> pairs_of(rows, []), pairs_of(rows, ["gmp vs. feather"])
        ([('feather', 'gmp')], [('gmp', 'feather')])
    """
    known = labels(rows)
    if not texts:
        if len(known) < 2:
            raise ConfigurationError(f"A comparison requires two sparse methods, got {known}.")
        return [(known[0], other) for other in known[1:]]
    pairs = []
    for text in texts:
        first, _, second = text.partition(" vs. ")
        if not {first, second} <= set(known):
            raise ConfigurationError(
                f"--pair {text!r}: write 'FIRST vs. SECOND' with labels of the runs: "
                f"{', '.join(known)}."
            )
        pairs.append((first, second))
    return pairs

"""Figure 2 of the supplement: gradient scaling of pruned weights and stability of the mask."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from ..training import Config
from .comparison import MIN_SEEDS, compare_pairs, is_significant, paired
from .descriptions import DESCRIPTIONS
from .figures import accuracy_figure, plot_over_epochs
from .planning import grid
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, StudyFigure
from .summary import accuracy_table, group, labels, percent, sparsities, with_deviation

THETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def label_of(theta: float) -> str:
    """Return the label of runs with this θ.

    Args:
        theta: factor of the gradients of pruned weights, 0 to 1.

    Example:
        >>> label_of(0.25)
        'θ = 0.25'
    """
    return f"θ = {theta:g}"


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan Feather with each θ, recording the mask after every epoch."""
    variants = {label_of(t): {"method": "feather", "options": {"theta": t}} for t in THETAS}
    return grid(replace(config, track_masks=True), variants, axes)


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return Figure 2 for each sparsity, and the accuracies."""
    stability = (
        "mean correlation over epochs",
        lambda found: with_deviation([_mean_correlation(row) for row in found], 3),
    )
    pairs = [(label_of(theta), label_of(1)) for theta in THETAS[:-1]]
    sentences, differences = compare_pairs(rows, [*pairs, (label_of(0.5), label_of(0))])
    return Answer(
        [*stability_sentences(rows), *sentences],
        Section(
            [*_correlation_figures(rows), *accuracy_figure(rows)],
            [accuracy_table(rows, more=[stability]), *differences],
        ),
    )


def _correlation_figures(rows: Sequence[Row]) -> list[StudyFigure]:
    groups = group(rows)
    figures = []
    for sparsity in sparsities(rows):
        curves = {
            label: [row["curve"]["mask_correlation"] for row in groups[label, sparsity]]
            for label in labels(rows)
            if (label, sparsity) in groups
        }
        figures.append(
            StudyFigure(
                f"correlation-{100 * sparsity:g}",
                plot_over_epochs(curves, f"correlation with the final mask ({percent(sparsity)})"),
                f"Correlation of the mask after each epoch with the final mask at "
                f"{percent(sparsity)} sparsity: mean over seeds; bands: ± one standard deviation. "
                "The correlation is undefined for masks that keep every weight.",
            )
        )
    return figures


def _mean_correlation(row: Row) -> float:
    """Return the mean of a run's correlations with the final mask; higher if stable earlier."""
    found = [r for r in row["curve"]["mask_correlation"] if r is not None]
    return statistics.mean(found) if found else math.nan


def stability_sentences(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each sparsity on whether smaller θ stabilizes the mask earlier.

    Sparsities with fewer than `MIN_SEEDS` seeds of a θ are left out.

    Args:
        rows: the runs, each with the correlations of its masks.

    Example:
        >>> rows = [
        ...     {"label": label_of(theta), "method": "feather", "sparsity": 0.9, "seed": seed}
        ...     | {"curve": {"mask_correlation": [1 - theta / 2 - seed / 100 * theta]}}
        ...     for theta in THETAS
        ...     for seed in range(3)
        ... ]
        >>> stability_sentences(rows)[0][:64]
        'At 90% sparsity the mask stabilizes earlier for smaller θ: mean '
    """
    groups, sentences = group(rows), []
    for sparsity in sparsities(rows):
        found = [groups.get((label_of(theta), sparsity), []) for theta in THETAS]
        n = min(map(len, found))
        if n < MIN_SEEDS:
            continue
        means = [statistics.mean(map(_mean_correlation, mine)) for mine in found]
        if all(a > b for a, b in itertools.pairwise(means)):
            result = "the mask stabilizes earlier for smaller θ"
        else:
            result = "the time at which the mask stabilizes is not monotonic in θ"
        sentence = (
            f"At {percent(sparsity)} sparsity {result}: mean correlation over epochs "
            f"{', '.join(f'{m:.3f}' for m in means)} for θ = "
            f"{', '.join(f'{t:g}' for t in THETAS)} (n ≥ {n})."
        )
        neighbours = itertools.pairwise(zip(THETAS, found, strict=True))
        close = [
            f"{a:g} and {b:g}"
            for (a, first), (b, second) in neighbours
            if not is_significant(paired(first, second, _mean_correlation))
        ]
        if close:
            sentence += f" No significant difference between θ = {', '.join(close)}."
        sentences.append(sentence)
    return sentences


STABILITY = Study(**vars(DESCRIPTIONS["stability"]), plan=_plan, answer=_answer)

"""Figure 2 of the supplement: how scaling the gradient of pruned weights settles the mask."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from ..training.config import Config
from .figures import over_epochs, over_sparsity
from .grid import Row, Run
from .spread import (
    ENOUGH,
    accuracy_table,
    against,
    apart,
    group,
    labels,
    paired,
    percent,
    sparsities,
    with_spread,
)
from .study import Answer, Choices, Part, Picture, Study, grid

THETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def name(theta: float) -> str:
    """Of a curve."""
    return f"θ = {theta:g}"


def plan(config: Config, choices: Choices) -> list[Run]:
    """Feather with each theta, the mask recorded after every epoch."""
    variants = {name(t): {"method": "feather", "options": {"theta": t}} for t in THETAS}
    return grid(replace(config, track_masks=True), variants, choices)


def answer(rows: Sequence[Row], config: Config) -> Answer:
    """Figure 2 for each sparsity, and the accuracies."""
    groups = group(rows)
    curves = [
        Picture(
            f"correlation-{100 * sparsity:g}",
            over_epochs(
                {
                    label: [row["curve"]["mask_correlation"] for row in groups[label, sparsity]]
                    for label in labels(rows)
                    if (label, sparsity) in groups
                },
                f"correlation with the final mask ({percent(sparsity)})",
            ),
            f"At {percent(sparsity)}: correlation of the mask after each epoch with the final one. "
            "Mean over seeds; bands: ± one standard deviation. A mask that keeps everything has no "
            "correlation.",
        )
        for sparsity in sparsities(rows)
    ]
    accuracy = [
        Picture(
            "accuracy",
            over_sparsity(rows),
            "Test accuracy after the last epoch: mean over seeds; bars: ± one standard deviation.",
        )
    ]
    settled = (
        "mean correlation over epochs",
        lambda found: with_spread([mean_correlation(row) for row in found], 3),
    )
    pairs = [(name(theta), name(1)) for theta in THETAS[:-1]]
    sentences, differences = against(rows, [*pairs, (name(0.5), name(0))])
    return Answer(
        [*order_of_settling(rows), *sentences],
        Part(curves + accuracy * bool(rows), [accuracy_table(rows, more=[settled]), *differences]),
    )


def mean_correlation(row: Row) -> float:
    """How early the mask settled, as one number: the mean height of its curve."""
    found = [r for r in row["curve"]["mask_correlation"] if r is not None]
    return statistics.mean(found) if found else math.nan


def order_of_settling(rows: Sequence[Row]) -> list[str]:
    """Whether masks settle the earlier the smaller theta is."""
    groups, told = group(rows), []
    for sparsity in sparsities(rows):
        found = [groups.get((name(theta), sparsity), []) for theta in THETAS]
        if min(map(len, found)) < ENOUGH:
            continue
        means = [statistics.mean(map(mean_correlation, mine)) for mine in found]
        pairs = itertools.pairwise(zip(THETAS, found, strict=True))
        close = [
            f"{a:g} and {b:g}"
            for (a, ours), (b, other) in pairs
            if not apart(paired(ours, other, mean_correlation))
        ]
        falls = all(a > b for a, b in itertools.pairwise(means))
        order = (
            "settles the earlier the smaller θ is" if falls else "does not settle in the order of θ"
        )
        alike = f"; not told apart: {', '.join(close)}" if close else ""
        told.append(
            f"At {percent(sparsity)} the mask {order}: mean correlation over epochs "
            f"{', '.join(f'{m:.3f}' for m in means)} for θ = "
            f"{', '.join(f'{t:g}' for t in THETAS)} (n ≥ {min(map(len, found))}{alike})."
        )
    return told


STABILITY = Study(
    name="stability",
    question="How early does the mask become what it will be, and is earlier better?",
    reading="The mask says which weights are kept. Feather multiplies the gradient of pruned "
    "weights by θ: at 0 they get none and hardly come back, at 1 they compete as if they were "
    "kept. A curve at 1 has reached its final mask. While the sparsity still rises, in the first "
    "half of the training, no mask can be the final one.",
    source="Figure 2 of the supplement",
    plan=plan,
    answer=answer,
    sparsities="0.9,0.98,0.99",
    small_sparsities="0.9,0.99",
)

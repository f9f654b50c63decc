"""Phases of a study: runs with seeds of their own, measured on validation data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigurationError
from ..training import Config
from ..training.config import apply
from .comparison import interval, paired
from .metric import ACCURACY, Metric
from .planning import grid
from .runs import Row, Run
from .study import GridAxes, Table
from .summary import group, percent, with_deviation

Variants = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Phase:
    """Runs with one purpose.

    Attributes:
        name: name of the phase.
        variants: what is trained, as for `planning.grid`.
        seeds: seeds of the runs; empty for those of the command line.
        epochs: fraction of the recipe's epochs.
        validation: fraction of the training data that is held out and measured; 0 for none, if
            test data is measured.
        sparsities: sparsities of the runs; empty for those of the command line.

    Example:
        >>> variants = {"feather": {"method": "feather"}}
        >>> phases = Phase("exploration", variants, seeds=(1000, 1001)), Phase("final", variants)
        >>> [phase.label("feather") for phase in phases]
        ['exploration: feather', 'feather']
    """

    name: str
    variants: Variants
    seeds: tuple[int, ...] = ()
    epochs: float = 1.0
    validation: float = 0.1
    sparsities: tuple[float, ...] = ()

    def label(self, variant: str) -> str:
        """Return the label of a variant's runs, which differs between phases."""
        return f"{self.name}: {variant}" if self.seeds else variant

    def runs(self, config: Config, axes: GridAxes) -> list[Run]:
        """Return the runs of this phase.

        Args:
            config: common settings of the study.
            axes: sparsities, and the seeds of the final comparison.
        """
        epochs = max(1, round(self.epochs * config.epochs))
        settings = {"epochs": epochs, "data.validation": self.validation}
        mine = apply(config, settings, self.name)
        labelled = {self.label(name): variant for name, variant in self.variants.items()}
        sparsities = self.sparsities or axes.sparsities
        return grid(mine, labelled, GridAxes(sparsities, self.seeds or axes.seeds))

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that are of this phase."""
        known = {self.label(name) for name in self.variants}
        return [row for row in rows if row["label"] in known]

    def validation_table(
        self, rows: Sequence[Row], base: Callable[[str], str], metric: Metric = ACCURACY
    ) -> Table:
        """Return the metric on validation data, and differences with the same seeds.

        Args:
            rows: the runs of this phase.
            base: returns the variant from which a variant's difference is taken.
            metric: the number to show.
        """
        words = "accuracy on validation images" if metric is ACCURACY else metric.name
        held_out = "held out of the training images" if metric is ACCURACY else "of held-out text"
        caption = (
            f"{self.name.capitalize()} (seeds {', '.join(map(str, self.seeds))}): {words}, "
            f"{held_out}; no conclusion is drawn. Differences from "
            f"{' or '.join(dict.fromkeys(map(base, self.variants)))} are paired over seeds, with "
            "uncorrected 95% t intervals."
        )
        groups, lines = group(rows), []
        for (label, sparsity), mine in sorted(groups.items(), key=lambda item: item[0][1]):
            variant = label.removeprefix(f"{self.name}: ")
            others = groups.get((self.label(base(variant)), sparsity), [])
            values = paired(mine, others, metric.validation) if mine != others else []
            minutes = [row["seconds"] / 60 for row in mine]
            lines.append(
                [
                    variant,
                    percent(sparsity) if sparsity else "",
                    with_deviation([metric.validation(row) for row in mine], metric.digits),
                    metric.signed(statistics.mean(values)) if values else "–",
                    _interval(values, metric),
                    str(len(mine)),
                    str(mine[0]["epochs"]),
                    f"{statistics.mean(minutes):.0f}",
                ]
            )
        name = "validation accuracy (%)" if metric is ACCURACY else metric.heading
        head = ["method", "sparsity", name, f"difference ({metric.points})", "95% CI", "n"]
        return Table(caption, [*head, "epochs", "minutes per run"], lines)


def check_seeds(phases: Sequence[Phase], seeds: Sequence[int]) -> None:
    """Raise an error if the final comparison has a seed of another phase.

    Args:
        phases: all phases.
        seeds: the seeds of the final comparison.

    Raises:
        ConfigurationError: a seed is used twice.

    Example:
        >>> check_seeds([Phase("exploration", {}, seeds=(1000,))], [0, 1000])
        Traceback (most recent call last):
        torch_feather.errors.ConfigurationError: --seeds 1000: exploration uses this seed. ...
    """
    for phase in phases:
        if used := sorted(set(phase.seeds) & set(seeds)):
            raise ConfigurationError(
                f"--seeds {used[0]}: {phase.name} uses this seed. Choose others for the final "
                "comparison."
            )


def _interval(values: Sequence[float], metric: Metric) -> str:
    if len(values) < 2 or statistics.stdev(values) < 1e-9:
        return "–"
    low, high = interval(values)
    return f"{metric.signed(low)} to {metric.signed(high)}"

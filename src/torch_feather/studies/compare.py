"""The main comparison: any methods with the same training budget."""

from __future__ import annotations

from collections.abc import Sequence

from ..training import Config
from .comparison import Pair, compare_pairs
from .descriptions import DESCRIPTIONS
from .figures import accuracy_figure, loss_figure, seed_figures
from .planning import grid
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study
from .summary import accuracy_table, labels


def plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan each method at each sparsity.

    Args:
        config: common settings of the runs.
        axes: methods, sparsities and seeds.

    Raises:
        ConfigurationError: an option that none of the methods has.

    Example:
        >>> from torch_feather.training import resolve_config
        >>> axes = GridAxes(sparsities=[0.9, 0.98], seeds=[0], methods=["dense", "feather"])
        >>> [run.name for run in plan(resolve_config("digits"), axes)]
        ['digits-dense-0', 'digits-feather-0.9-0', 'digits-feather-0.98-0']
    """
    return grid(config, axes.variants, axes)


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return accuracy over sparsity, training loss at the highest sparsity, and every seed."""
    sentences, differences = compare_pairs(rows, first_with_others(rows))
    figures = [*accuracy_figure(rows), *loss_figure(rows), *seed_figures(rows)]
    return Answer(sentences, Section(figures, [accuracy_table(rows), *differences]))


def first_with_others(rows: Sequence[Row]) -> list[Pair]:
    """Return pairs of the first sparse method of the plan with each of the others.

    Args:
        rows: the runs, in the order of the plan.

    Example:
        >>> methods = ("dense", "feather", "gmp", "st3")
        >>> first_with_others([{"method": method, "label": method} for method in methods])
        [('feather', 'gmp'), ('feather', 'st3')]
    """
    names = labels(rows)
    return [(names[0], other) for other in names[1:]]


COMPARE = Study(**vars(DESCRIPTIONS["compare"]), plan=plan, answer=_answer)

"""The parts of a study: question, training runs and answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..methods import available_methods
from ..training import Config
from ..training.config import DENSE, parse_assignments
from .descriptions import Description
from .runs import Row, Run


@dataclass(frozen=True)
class GridAxes:
    """The sparsities, seeds and methods of a study's runs, as given on the command line.

    Attributes:
        sparsities: target sparsities.
        seeds: random seeds.
        methods: method names, or `package.module:factory`, with their own options as in
            `feather:p=2:theta=1`.
    """

    sparsities: Sequence[float]
    seeds: Sequence[int]
    methods: Sequence[str] = ()

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Label of each method, with the fields of `Config` that select it.

        Example:
            >>> list(GridAxes([0.9], [0], ["dense", "feather:p=2"]).variants)
            ['dense', 'feather (p = 2)']
        """
        found: dict[str, dict[str, Any]] = {}
        for text in self.methods:
            method, *options = (part.strip() for part in text.split(":"))
            if options and "=" not in options[0] and method not in (DENSE, *available_methods()):
                method += f":{options.pop(0)}"
            shown = ", ".join(" = ".join(option.split("=")) for option in options)
            label = f"{method} ({shown})" if shown else method
            given = parse_assignments(options, "--methods")
            found[label] = {"method": method} | ({"options": given} if given else {})
        return found


@dataclass(frozen=True)
class StudyFigure:
    """A figure with its file name (without extension) and caption.

    Attributes:
        name: file name, unique in its study.
        figure: the figure.
        caption: one or more sentences.

    Example:
        >>> StudyFigure("accuracy", Figure(), "Test accuracy after the last epoch.").name
        'accuracy'
    """

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of text with its caption."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_text(self, column: int) -> bool:
        """Return whether a column is left-aligned: the first one, and those that hold words.

        Example:
            >>> table = Table("", ["method", "accuracy"], [["feather", "45.09"]])
            >>> table.is_text(0), table.is_text(1)
            (True, False)
        """
        return column == 0 or any(row[column][:1].isalpha() for row in self.rows)


@dataclass(frozen=True)
class Section:
    """Figures and tables of one part of a page.

    Attributes:
        figures: in the order of the page.
        tables: in the order of the page, below the figures.

    Example:
        >>> section = Section(tables=[Table("Accuracy", ["method"], [["feather"]])])
        >>> len(section.figures), section.tables[0].caption
        (0, 'Accuracy')
    """

    figures: Sequence[StudyFigure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Answer:
    """Conclusions of a study, its measurements, and published numbers in a separate section.

    Attributes:
        sentences: conclusions; none with fewer than `comparison.MIN_SEEDS` seeds.
        measured: figures and tables of the study's runs.
        published: figures and tables of numbers from publications.

    Example:
        >>> answer = Answer(["feather is significantly above gmp."], measured=Section())
        >>> answer.published.tables  # a study may have no published numbers
        ()
    """

    sentences: Sequence[str]
    measured: Section
    published: Section = Section()


@dataclass(frozen=True, kw_only=True)
class Study(Description):
    """A table or figure of the paper as training runs that anyone can repeat.

    Attributes:
        plan: returns the runs for a configuration and grid axes.
        answer: returns the answer from the rows of all or some of the runs.
        measure: measures a trained network and returns the keys to add to its row. Arguments: row,
            run directory, output directory, path of the data, whether to time it now.

    Example:
        >>> from torch_feather.studies.planning import grid
        >>> study = Study(
        ...     name="powers",
        ...     question="Is p = 2 better than p = 3?",
        ...     background="p is the exponent of the threshold operator.",
        ...     source="None",
        ...     plan=lambda config, axes: grid(config, axes.variants, axes),
        ...     answer=lambda rows, config: Answer([f"{len(rows)} runs"], Section()),
        ...     methods="feather:p=2,feather:p=3",
        ... )
        >>> axes = GridAxes([0.9], [0], study.methods.split(","))
        >>> [run.label for run in study.plan(Config(recipe="digits"), axes)]
        ['feather (p = 2)', 'feather (p = 3)']
    """

    plan: Callable[[Config, GridAxes], list[Run]]
    answer: Callable[[Sequence[Row], Config], Answer]
    measure: Callable[[Row, Path, Path, str | None, bool], Row] | None = None

"""What a study is: a question, the trainings that answer it, and how the answer is told."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import ConfigurationError, nearest
from ..methods import method_options
from ..training.config import (
    DENSE,
    Config,
    flatten,
    parse_assignments,
    resolve_config,
    to_dict,
)
from .grid import Row, Run


@dataclass(frozen=True)
class Choices:
    """What one chooses for a study on the command line, beside the settings of its trainings."""

    sparsities: Sequence[float]
    seeds: Sequence[int]
    methods: Sequence[str] = ()  # names, with options of their own as `feather:p=2:theta=1`

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """What the methods are called in the answer, and the fields of `Config` that make them."""
        found: dict[str, dict[str, Any]] = {}
        for text in self.methods:
            method, *options = (part.strip() for part in text.split(":"))
            own = ", ".join(" = ".join(one.split("=")) for one in options)
            label = f"{method} ({own})" if own else method
            given = parse_assignments(options, "--methods")
            found[label] = {"method": method} | ({"options": given} if given else {})
        return found


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its files, and what is to be seen."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of text, and what it holds."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_text(self, column: int) -> bool:
        """Whether the column holds words, not numbers alone."""
        return column == 0 or any(row[column][:1].isalpha() for row in self.rows)


@dataclass(frozen=True)
class Part:
    """Pictures and tables that belong together."""

    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Answer:
    """What the trainings say, and, apart from it, what is published."""

    sentences: Sequence[str]  # only where there are at least `spread.ENOUGH` seeds
    ours: Part
    published: Part = Part()


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper as trainings that anyone can repeat."""

    name: str
    question: str
    reading: str  # what a newcomer has to know to read the answer
    source: str  # the figure or table of the paper
    plan: Callable[[Config, Choices], list[Run]]
    answer: Callable[[Sequence[Row], Config], Answer]  # rows may be of a part of the plan
    # What is measured of a trained network, into its row: (row, run directory, --out, --data-path)
    measure: Callable[[Row, Path, Path, str | None], Row] | None = None
    sparsities: str = "0.9,0.95,0.98,0.99,0.995"
    methods: str | None = None  # by default; None: the study's question decides
    # Settings on the digits, which are learned in a few epochs: more would hide all differences.
    small: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 10})
    small_sparsities: str = "0.95,0.98,0.99"
    decides: Sequence[str] = ()  # settings of its trainings that are its own


def grid(config: Config, variants: Mapping[str, Mapping[str, Any]], choices: Choices) -> list[Run]:
    """Every variant at every sparsity for every seed.

    Seeds are outermost, so that every variant has its first seed early. The dense network is
    trained once per seed, whatever the sparsities.

    Args:
        config: what the runs have in common. Its options go to the methods that have them.
        variants: label to the fields of `Config` that make it.
        choices: sparsities and seeds.

    Raises:
        ConfigurationError: an option that none of the methods has.
    """
    methods = [variant["method"] for variant in variants.values()]
    known = {method: {} if method == DENSE else method_options(method) for method in methods}
    for option in config.options:
        if not any(option in names for names in known.values()):
            raise ConfigurationError(f"None of {', '.join(known)} has an option {option!r}.")
    runs: dict[str, Run] = {}
    for seed, sparsity, label in itertools.product(choices.seeds, choices.sparsities, variants):
        variant = dict(variants[label])
        own = known[variant["method"]]
        options = {key: value for key, value in config.options.items() if key in own}
        for option, value in variant.get("options", {}).items():
            if option not in own:
                raise ConfigurationError(
                    f"{variant['method']} has no option {option!r}{nearest(option, own)}"
                )
            options[option] = value
        # Without what is the default anyway, equal runs have equal names.
        variant["options"] = {k: v for k, v in options.items() if v != own.get(k, ...)}
        one = replace(config, seed=seed, sparsity=sparsity, compare_dense=False, **variant)
        name = name_of(one)
        runs.setdefault(name, Run(name, one, label))
    return list(runs.values())


_ASIDE = (
    *("recipe", "method", "sparsity", "seed", "compare_dense", "track_masks"),
    *("data.name", "data.path"),
)
_OF_SYSTEM = ("system.amp", "system.micro_batch")  # what of it changes the numbers


def name_of(config: Config) -> str:
    """Folder of a run: recipe, method, sparsity and seed, and all in which it differs from these.

    Two studies that need the same run so find it under the same name.
    """
    recipe = resolve_config(config.recipe)
    usual = flatten(to_dict(recipe))
    differs = {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if value != usual.get(key, ...)
        and key not in _ASIDE
        and (key in _OF_SYSTEM or not key.startswith("system."))
    }
    parts = [str(config.recipe)]
    if config.data.title != recipe.data.title:
        parts.append(config.data.title)
    if "network" in differs:
        parts.append(differs.pop("network"))
    parts.append(config.method)
    parts += [key.rpartition(".")[2] + _brief(value) for key, value in differs.items()]
    if config.method != DENSE:
        parts.append(_brief(config.sparsity))
    parts.append(str(config.seed))
    return re.sub(r"[^\w.+-]", "_", "-".join(parts))


def _brief(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower()

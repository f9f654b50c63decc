"""Reports of a sparse model: zeros, thresholds and multiply-adds per layer, as data and table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigurationError, fill_layers, some, warn
from ..participants import Chosen, choose, tell_once
from ..prunable import Filters, Prunable, is_lazy, unwrap
from ..weights.shards import count_nonzero
from .flops import count_flops


@dataclass(frozen=True)
class LayerReport:
    """One prunable weight tensor of a report.

    Attributes:
        name: dotted name of the weight.
        shape: its shape.
        weights: number of weights.
        zeros: number of weights that are exactly 0.
        threshold: magnitude up to which weights are pruned; None if unknown.
        dense_macs: multiply-adds per sample; None if they were not counted.
        sparse_macs: multiply-adds per sample of the nonzero weights; None likewise.

    Example:
        >>> LayerReport("fc.weight", (2, 4), weights=8, zeros=6).sparsity
        0.75
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    threshold: float | None = None
    dense_macs: int | None = None
    sparse_macs: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are exactly 0; 0 for a tensor without elements."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def empty(self) -> bool:
        """Whether every weight is 0, so that the output does not depend on the input."""
        return 0 < self.weights == self.zeros

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as numbers, strings and lists, for JSON."""
        derived = {"sparsity": self.sparsity, "empty": self.empty}
        return asdict(self) | {"shape": list(self.shape)} | derived


@dataclass(frozen=True)
class Report:
    """The prunable weights of a model, layer by layer; `str()` makes a table.

    Attributes:
        layers: one entry per prunable weight tensor.
        dense_macs: multiply-adds of the whole model per sample, also of layers that are not listed;
            None without an example input.
        sparse_macs: the same for nonzero weights.
        parameters: number of all parameters of the model, prunable or not.
        learned_sparsity: fraction that the method prunes without the final exact-count pruning, as
            `Sparsifier.learned_sparsity`. None without a sparsifier.
        others: entries of further weights that are prunable by default, such as frozen or excluded
            ones. All numbers above are without them.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> _ = nn.init.zeros_(model.weight[0])
        >>> print(report(model))
        layer   shape  weights  zeros  sparsity
        ---------------------------------------
        weight  2x4          8      4   50.00 %
        ---------------------------------------
        total                8      4   50.00 %
        Of all 10 parameters of the model, these zeros are 40.00 %.
    """

    layers: list[LayerReport]
    dense_macs: int | None = None
    sparse_macs: int | None = None
    parameters: int | None = None
    learned_sparsity: float | None = None
    others: list[LayerReport] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Number of prunable weights that are exactly 0."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are exactly 0."""
        return self.zeros / self.weights

    @property
    def sparsity_of_all(self) -> float | None:
        """Zeros of the prunable weights as a fraction of all parameters; None without them."""
        return self.zeros / self.parameters if self.parameters else None

    @property
    def sparsity_with_others(self) -> float:
        """Fraction of the prunable weights and `others` that are exactly 0."""
        layers = [*self.layers, *self.others]
        return sum(layer.zeros for layer in layers) / sum(layer.weights for layer in layers)

    @property
    def empty_layers(self) -> list[str]:
        """Names of the layers in which every weight is 0."""
        return [layer.name for layer in self.layers if layer.empty]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as numbers, strings, lists and dicts, for JSON."""
        return {
            "weights": self.weights,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "learned_sparsity": self.learned_sparsity,
            "parameters": self.parameters,
            "sparsity_of_all": self.sparsity_of_all,
            "sparsity_with_others": self.sparsity_with_others,
            "dense_macs": self.dense_macs,
            "sparse_macs": self.sparse_macs,
            "empty_layers": self.empty_layers,
            "layers": [layer.to_dict() for layer in self.layers],
            "others": [layer.to_dict() for layer in self.others],
        }

    def __str__(self) -> str:
        return _table(self)


def report(
    model: nn.Module,
    include: Filters = None,
    exclude: Filters = None,
    *,
    example_input: Any = None,
    thresholds: Mapping[str, Tensor | float] | None = None,
) -> Report:
    """Report the prunable weights of a model: zeros, thresholds and multiply-adds per layer.

    Args:
        model: any module.
        include, exclude: filters that choose the weights, as for `sparsity`.
        example_input: an input to count multiply-adds with, as for `count_flops`. None: they are
            not counted.
        thresholds: thresholds to list, by weight name, as `Sparsifier.thresholds()` returns them.

    Raises:
        ConfigurationError: no weight is prunable; also raised by `find_prunable` and `count_flops`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
        >>> [(layer.name, layer.weights) for layer in report(model).layers]
        [('0.weight', 8), ('1.weight', 2)]
    """
    if thresholds is not None and not isinstance(thresholds, Mapping):
        raise ConfigurationError(
            "thresholds must be a mapping from names to numbers, as Sparsifier.thresholds() "
            f"returns it, got {type(thresholds).__name__}."
        )
    chosen = _choose(model, include, exclude)
    macs: dict[int, tuple[int, int]] = {}
    totals: tuple[int | None, int | None] = (None, None)
    if example_input is not None:
        flops = count_flops(model, example_input)
        totals = (flops.dense, flops.sparse)
        by_name = dict(unwrap(model).named_parameters(remove_duplicate=False))
        for layer in flops.layers:
            # By identity: a weight with several names gets the sum over its uses.
            weight = by_name.get(layer.name)  # None if it is computed from other parameters
            dense, sparse = macs.get(id(weight), (0, 0))
            macs[id(weight)] = (dense + layer.dense, sparse + layer.sparse)

    def entry(item: Prunable) -> LayerReport:
        threshold = (thresholds or {}).get(item.name)
        dense_macs, sparse_macs = macs.get(id(item.parameter), (None, None))
        return LayerReport(
            name=item.name,
            shape=tuple(item.parameter.shape),
            weights=item.parameter.numel(),
            zeros=_zeros([item]),
            threshold=None if threshold is None else float(threshold),
            dense_macs=dense_macs,
            sparse_macs=sparse_macs,
        )

    layers, others = [entry(item) for item in chosen.weights], [entry(i) for i in chosen.others]
    parameters = sum(p.numel() for p in unwrap(model).parameters() if not is_lazy(p))
    return Report(layers, *totals, parameters, others=others)


def sparsity(model: nn.Module, include: Filters = None, exclude: Filters = None) -> float:
    """Return the fraction of exact zeros among the prunable weights of a model.

    After `sparsify`, these are the weights that took part in sparse training. So the result is the
    number that was asked for, also if layers were frozen, included or excluded. If other weights of
    the model are prunable by default, a warning gives the fraction with them, once per model.

    Python remembers the weights that took part as long as the model lives, `load_sparse` reads them
    from the file. A copy of a model, or a loaded state dict, does not contain them: then the
    weights are those that are prunable by default.

    Args:
        model: any module.
        include: filters that choose other weights, see `prunable.find_prunable`.
        exclude: filters of weights to leave out.

    Raises:
        ConfigurationError: no weight is prunable.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> _ = nn.init.zeros_(model.weight[0])
        >>> sparsity(model)
        0.5
    """
    chosen = _choose(model, include, exclude)
    zeros, size = _zeros(chosen.weights), _size(chosen.weights)
    others = _size(chosen.others)
    if chosen.remembered and exclude is None and others and tell_once(model):
        both = (zeros + _zeros(chosen.others)) / (size + others)
        warn(
            f"The sparsity {zeros / size:.6g} is that of the {size:,} weights that took part in "
            f"sparse training. {some([item.name for item in chosen.others])} did not, such as "
            f"frozen or excluded layers. With these {others:,} weights it is {both:.6g}. To choose "
            "the weights, pass include=."
        )
    return zeros / size


def _choose(model: nn.Module, include: Filters, exclude: Filters) -> Chosen:
    """Return the weights to measure; raise ConfigurationError if there are none."""
    chosen = choose(model, include, exclude)
    if not _size(chosen.weights):
        left = "" if include is None and exclude is None else " that include and exclude leave"
        raise ConfigurationError(f"{type(model).__name__} has no prunable weight{left}.")
    return chosen


def _size(weights: Iterable[Prunable]) -> int:
    """Return the number of weights."""
    return sum(item.parameter.numel() for item in weights)


def _zeros(weights: Iterable[Prunable]) -> int:
    """Return the number of exact zeros, over all processes."""
    return sum(item.parameter.numel() - count_nonzero(item.parameter) for item in weights)


EMPTY_MARK = "<-- EMPTY"


def _table(report: Report) -> str:
    """Return a report as a table with notes below it."""
    with_threshold = any(layer.threshold is not None for layer in report.layers)
    with_macs = report.dense_macs is not None

    def row(cells: list[str], threshold: str, macs: list[str], mark: str = "") -> list[str]:
        return cells + [threshold] * with_threshold + macs * with_macs + [mark]

    header = row(
        ["layer", "shape", "weights", "zeros", "sparsity"],
        "threshold",
        ["dense MACs", "sparse MACs"],
    )
    body = [
        row(
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.weights:,}",
                f"{layer.zeros:,}",
                percent(layer.zeros, layer.weights),
            ],
            "-" if layer.threshold is None else f"{layer.threshold:.4g}",
            [macs_text(layer.dense_macs), macs_text(layer.sparse_macs)],
            EMPTY_MARK if layer.empty else "",
        )
        for layer in report.layers
    ]
    total = row(
        [
            "total",
            "",
            f"{report.weights:,}",
            f"{report.zeros:,}",
            percent(report.zeros, report.weights),
        ],
        "",
        [
            macs_text(sum(layer.dense_macs or 0 for layer in report.layers)),
            macs_text(sum(layer.sparse_macs or 0 for layer in report.layers)),
        ],
    )
    lines = _align([header, *body, total])
    rule = "-" * max(len(line.removesuffix(EMPTY_MARK).rstrip()) for line in lines)
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    return "\n".join(lines + _notes(report))


def _notes(report: Report) -> list[str]:
    """Return the lines below the table."""
    notes = []
    if report.parameters is not None:
        notes.append(
            f"Of all {report.parameters:,} parameters of the model, these zeros are "
            f"{percent(report.zeros, report.parameters)}."
        )
    if report.others:
        others = sum(layer.weights for layer in report.others)
        zeros = report.zeros + sum(layer.zeros for layer in report.others)
        names = some([layer.name for layer in report.others])
        notes.append(
            f"Not listed, such as frozen or excluded layers: {others:,} weights of {names}. With "
            f"them, {percent(zeros, report.weights + others)} of the weights are zero."
        )
    learned = report.learned_sparsity
    if learned is not None and round(learned * report.weights) != report.zeros:
        notes.append(
            "Without the final exact-count pruning the method prunes "
            f"{percent(round(learned * report.weights), report.weights)}."
        )
    listed = sum(layer.dense_macs or 0 for layer in report.layers)
    if report.dense_macs is not None and report.dense_macs != listed:
        notes.append(
            f"With the layers that are not listed: {macs_text(report.dense_macs)} dense, "
            f"{macs_text(report.sparse_macs)} sparse multiply-adds."
        )
    if report.empty_layers:
        count = len(report.empty_layers)
        notes.append(
            f"WARNING: {count} {'layer is' if count == 1 else 'layers are'} EMPTY (all weights "
            f"zero, nothing passes through): {', '.join(report.empty_layers)}. "
            f"{fill_layers(report.empty_layers)}"
        )
    return notes


def _align(rows: list[list[str]]) -> list[str]:
    """Return rows as lines: names, shapes and marks left-aligned, numbers right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, 1, len(widths) - 1}
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    ]


def percent(part: int, whole: int) -> str:
    """Return part / whole in percent with two decimals; 0.00 % and 100.00 % only if exact.

    Example:
        >>> percent(1, 3), percent(99_999, 100_000)
        ('33.33 %', '99.99 %')
    """
    if part in (0, whole):
        return "100.00 %" if part else "0.00 %"
    return f"{min(max(100 * part / whole, 0.01), 99.99):.2f} %"


def macs_text(macs: int | None) -> str:
    """Return multiply-adds as text with a unit and two decimals; '-' for None.

    Example:
        >>> macs_text(864), macs_text(42_048), macs_text(4_089_000_000)
        ('864', '42.05 k', '4.09 G')
    """
    if macs is None:
        return "-"
    value, units = float(macs), iter(("", " k", " M", " G", " T", " P"))
    unit = next(units)
    while value >= 999.995 and (larger := next(units, None)) is not None:
        value, unit = value / 1000, larger
    return f"{value:.2f}{unit}" if unit else str(macs)

"""What became of each layer: zeros, thresholds and multiply-adds, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..errors import FILL_LAYERS, ConfigurationError
from ..prunable import Filters, Prunable, find_prunable, unwrap
from ..weights.shards import count_nonzero
from .flops import count_flops


@dataclass(frozen=True)
class LayerReport:
    """One prunable weight tensor; multiply-adds are per sample, None where not counted."""

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    threshold: float | None = None
    dense_macs: int | None = None
    sparse_macs: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are exactly zero (0 for a tensor without elements)."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def empty(self) -> bool:
        """Whether every weight is zero, so that nothing passes through the layer."""
        return 0 < self.weights == self.zeros


@dataclass(frozen=True)
class Report:
    """The prunable weights of a model, layer by layer; `str()` of it is a table.

    `dense_macs` and `sparse_macs` are those of the whole model, also of layers that are not
    listed; None without an example input. `parameters` counts all of the model's, prunable or not.
    `learned_sparsity` is what the method prunes by itself (see `Sparsifier`); None where no method is
    asked.
    """

    layers: list[LayerReport]
    dense_macs: int | None = None
    sparse_macs: int | None = None
    parameters: int | None = None
    learned_sparsity: float | None = None

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Number of them that are exactly zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are exactly zero."""
        return self.zeros / self.weights

    @property
    def sparsity_of_all(self) -> float | None:
        """Their zeros as a fraction of all parameters of the model."""
        return self.zeros / self.parameters if self.parameters else None

    @property
    def empty_layers(self) -> list[str]:
        """Names of layers in which every weight is zero."""
        return [layer.name for layer in self.layers if layer.empty]

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, ready for JSON."""
        return {
            "weights": self.weights,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "learned_sparsity": self.learned_sparsity,
            "parameters": self.parameters,
            "sparsity_of_all": self.sparsity_of_all,
            "dense_macs": self.dense_macs,
            "sparse_macs": self.sparse_macs,
            "empty_layers": self.empty_layers,
            "layers": [
                asdict(layer)
                | {"shape": list(layer.shape), "sparsity": layer.sparsity, "empty": layer.empty}
                for layer in self.layers
            ],
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
    """Look at the prunable weights of `model`, as they are now.

    Args:
        model: any module.
        include: which weights, as for `find_prunable`.
        exclude: which weights not, as for `find_prunable`.
        example_input: with it multiply-adds are counted, as by `count_flops`.
        thresholds: by weight name, as `Sparsifier.thresholds()` gives them; they are shown
            beside the layers that they belong to.

    Raises:
        ConfigurationError: nothing is prunable, or what `find_prunable` or `count_flops` raise.
    """
    prunable = _some_prunable(model, include, exclude)
    macs: dict[int, tuple[int, int]] = {}
    totals: tuple[int | None, int | None] = (None, None)
    if example_input is not None:
        flops = count_flops(model, example_input)
        totals = (flops.dense, flops.sparse)
        for layer in flops.layers:
            # By identity, so that a weight that is used under several names gets the sum.
            weight = attrgetter(layer.name)(unwrap(model))
            dense, sparse = macs.get(id(weight), (0, 0))
            macs[id(weight)] = (dense + layer.dense, sparse + layer.sparse)
    layers = []
    for item in prunable:
        threshold = (thresholds or {}).get(item.name)
        dense_macs, sparse_macs = macs.get(id(item.parameter), (None, None))
        layers.append(
            LayerReport(
                name=item.name,
                shape=tuple(item.parameter.shape),
                weights=item.parameter.numel(),
                zeros=_zeros(item),
                threshold=None if threshold is None else float(threshold),
                dense_macs=dense_macs,
                sparse_macs=sparse_macs,
            )
        )
    parameters = sum(parameter.numel() for parameter in unwrap(model).parameters())
    return Report(layers, *totals, parameters)


def sparsity(model: nn.Module, include: Filters = None, exclude: Filters = None) -> float:
    """Fraction of exact zeros among the prunable weights of `model`, as they are now.

    Raises:
        ConfigurationError: nothing is prunable.
    """
    prunable = _some_prunable(model, include, exclude)
    return sum(map(_zeros, prunable)) / sum(item.parameter.numel() for item in prunable)


def _some_prunable(model: nn.Module, include: Filters, exclude: Filters) -> list[Prunable]:
    prunable = find_prunable(model, include, exclude)
    if not any(item.parameter.numel() for item in prunable):
        chosen = "" if include is None and exclude is None else " that include and exclude leave"
        raise ConfigurationError(f"{type(model).__name__} has no prunable weight{chosen}.")
    return prunable


def _zeros(item: Prunable) -> int:
    return item.parameter.numel() - count_nonzero(item.parameter)


EMPTY_MARK = "<-- EMPTY"


def _table(report: Report) -> str:
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
    """The lines under the table: what the rows alone would not make plain."""
    notes = []
    if report.parameters is not None:
        notes.append(
            f"Of all {report.parameters:,} parameters of the model, these zeros are "
            f"{percent(report.zeros, report.parameters)}."
        )
    own = report.learned_sparsity
    if own is not None and round(own * report.weights) != report.zeros:
        notes.append(
            f"By itself the method prunes {percent(round(own * report.weights), report.weights)}."
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
            f"zero, nothing passes through): {', '.join(report.empty_layers)}. {FILL_LAYERS}"
        )
    return notes


def _align(rows: list[list[str]]) -> list[str]:
    """Names, shapes and marks to the left, numbers to the right."""
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
    """`part` of `whole` with two decimals; 0.00 % and 100.00 % only where exact."""
    if part in (0, whole):
        return "100.00 %" if part else "0.00 %"
    return f"{min(max(100 * part / whole, 0.01), 99.99):.2f} %"


def macs_text(macs: int | None) -> str:
    """Multiply-adds with a unit, two decimals: 864, 42.05 k, 162.38 M, 4.09 G."""
    if macs is None:
        return "-"
    value, units = float(macs), iter(("", " k", " M", " G", " T", " P"))
    unit = next(units)
    while value >= 999.995 and (larger := next(units, None)) is not None:
        value, unit = value / 1000, larger
    return f"{value:.2f}{unit}" if unit else str(macs)

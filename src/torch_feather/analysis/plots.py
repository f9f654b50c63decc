"""Figures of a run and of the threshold operators, and the style of all figures (matplotlib)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..deprecation import renamed_names
from ..operators import power_threshold
from .stability import correlations, read_masks

__getattr__ = renamed_names(__name__, {"look": "line_style", "draw_run": "plot_run"})

# Colours of Okabe and Ito, distinct with all kinds of colour vision; purple replaces yellow, which
# is too light for lines.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7E4A9E"),
)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = "os^DvPX*<>"
BLUE, ORANGE, GREY = COLOURS[0], COLOURS[1], "#666666"
PALE_GREY = "#8A8A8A"  # series for which no colour is left

# Colours of SVG files on a light and on a dark page, by name.
SCHEMES = {
    "paper": ("#ffffff", "#16181c"),
    "rule": ("#e5e5e5", "#34383f"),
    "muted": (GREY, "#a7adb5"),
    "pale": (PALE_GREY, "#868c94"),
    "ink": ("#000000", "#e8eaed"),
    "blue": ("#0072B2", "#58b1ef"),
    "red": ("#D55E00", "#ff8a3d"),
    "green": ("#009E73", "#3ecfa0"),
    "pink": ("#CC79A7", "#e29cc4"),
    "orange": ("#E69F00", "#f2b53d"),
    "sky": ("#56B4E9", "#9ad6f7"),
    "purple": ("#7E4A9E", "#b98ad9"),
}


def line_style(i: int) -> dict[str, Any]:
    """Return colour, dashes and marker of the i-th series as keywords of matplotlib.

    The first eight series have distinct colours, which a reader can tell apart. All others are
    grey, with distinct dashes and markers.

    Args:
        i: position of the series, from 0.

    Example:
        >>> line_style(0)["color"], line_style(0)["marker"]
        ('#0072B2', 'o')
        >>> line_style(8)["color"] == line_style(9)["color"] == PALE_GREY
        True
    """
    return {
        "color": COLOURS[i] if i < len(COLOURS) else PALE_GREY,
        "linestyle": DASHES[(i + i // 7) % 7],
        "marker": MARKERS[i % 10],
        "markersize": 5,
        "linewidth": 1.6,
    }


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure with one pair of axes.

    Args:
        width: width in inches.
        height: height in inches.

    Example:
        >>> figure, axes = panel(6.4, 4.0)
        >>> figure.get_size_inches().tolist(), len(figure.axes)
        ([6.4, 4.0], 1)
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def adapt_colours(svg: str) -> str:
    """Return an SVG of matplotlib whose colours follow the light or dark scheme of the reader.

    Each colour of `SCHEMES` becomes a variable, which a style element sets for both schemes. A page
    that shows the SVG inline may set the variables itself.

    Args:
        svg: an SVG file, or its element.

    Example:
        >>> print(adapt_colours('<svg width="1"><path style="fill: #0072b2"/></svg>')[-56:])
        <path style="fill: var(--feather-blue, #0072B2)"/></svg>
    """
    light = {colour.lower(): name for name, (colour, _) in SCHEMES.items()}

    def variable(match: re.Match[str]) -> str:
        name = light.get(match[0].lower())
        return f"var(--feather-{name}, {SCHEMES[name][0]})" if name else match[0]

    svg = re.sub(r"#[0-9a-fA-F]{6}\b(?=[;\"])", variable, svg)
    start = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:start]}<style>{scheme_style()}</style>{svg[start:]}"


def scheme_style() -> str:
    """Return the CSS that sets the colours of `SCHEMES` for both schemes.

    Glyphs of matplotlib have no colour of their own if they are black.

    Example:
        >>> "--feather-paper:#ffffff" in scheme_style()
        True
    """
    light, dark = (
        "".join(f"--feather-{name}:{pair[i]};" for name, pair in SCHEMES.items()) for i in (0, 1)
    )
    return (
        f"svg{{{light}fill:var(--feather-ink)}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}"
    )


def plot_run(folder: Path, history: list[dict[str, Any]], results: dict[str, Any]) -> list[Path]:
    """Write curves.png, layers.png and operator.png of a run, and masks.png if masks are recorded.

    Args:
        folder: run directory.
        history: lines of metrics.jsonl.
        results: content of report.json.

    Returns:
        The files written.

    Example:
        >>> import tempfile
        >>> layer = {"name": "fc.weight", "weights": 100, "zeros": 90, "sparsity": 0.9}
        >>> results = {"network": "resnet20", "data": "digits", "method": "feather"}
        >>> results |= {"test_accuracy": 0.95, "report": {"weights": 100, "layers": [layer]}}
        >>> epoch = {"epoch": 1, "val_acc": 0.9, "sparsity": 0.9}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [file.name for file in plot_run(Path(folder), [epoch], results)]
        ['curves.png', 'layers.png', 'operator.png']
    """
    figures = {
        "curves.png": curves(history, results),
        "layers.png": layers(results["report"]["layers"]),
        "operator.png": operators(),
    }
    weights = results["report"]["weights"]
    if masks := read_masks(folder, len(history), weights):
        figures["masks.png"] = stability(correlations(masks, weights))
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def curves(history: list[dict[str, Any]], results: dict[str, Any]) -> Figure:
    """Plot accuracy and sparsity over epochs.

    The accuracy is the validation accuracy, or the test accuracy without validation images, or
    the training loss if neither was measured.

    Args:
        history: lines of metrics.jsonl.
        results: content of report.json.

    Example:
        >>> history = [{"epoch": 1, "val_acc": 0.9, "sparsity": 0.95}]
        >>> results = {"network": "resnet20", "data": "digits", "method": "feather"}
        >>> figure = curves(history, results | {"test_accuracy": 0.91})
        >>> figure.axes[0].get_title()
        'resnet20 on digits, feather: 91.0% test accuracy'
    """
    figure, axes = panel(6.4, 4.0)
    epochs = [line["epoch"] for line in history]
    held_out = any(line["val_acc"] is not None for line in history)
    measure = "mAP" if results.get("multi_label") is True else "accuracy"
    key, name = ("val_acc", "validation") if held_out else ("test_acc", "test")
    measured = [(line["epoch"], 100 * line[key]) for line in history if line.get(key) is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), color=BLUE, label=f"{name} {measure} (%)")
        axes.axhline(
            100 * results["test_accuracy"],
            color=BLUE,
            linestyle=":",
            label=f"final test {measure} (%)",
        )
        axes.set_ylabel(f"{measure} (%)")
    else:
        losses = [line["train_loss"] for line in history]
        axes.plot(epochs, losses, color=BLUE, label="training loss")
        axes.set_ylabel("training loss")
    if measured and "dense" in results:
        axes.axhline(
            100 * results["dense"]["test_accuracy"],
            color=GREY,
            linestyle=":",
            label=f"test {measure} of the dense network (%)",
        )
    axes.set_xlabel("epoch")
    right = axes.twinx()
    right.plot(
        epochs, [100 * line["sparsity"] for line in history], color=ORANGE, label="sparsity (%)"
    )
    right.set_ylabel("sparsity (%)")
    right.set_ylim(0, 102)
    right.spines["top"].set_visible(False)
    handles = [*axes.get_lines(), *right.get_lines()]
    axes.legend(handles, [str(h.get_label()) for h in handles], loc="center right", frameon=False)
    axes.set_title(
        plain(f"{results['network']} on {results['data']}, {results['method']}: ")
        + f"{100 * results['test_accuracy']:.1f}% test {measure}"
    )
    return figure


def layers(rows: list[dict[str, Any]]) -> Figure:
    """Plot the sparsity of each layer, each bar labelled with the number of nonzero weights.

    Args:
        rows: `layers` of a report.

    Example:
        >>> figure = layers([{"name": "fc.weight", "weights": 100, "zeros": 90, "sparsity": 0.9}])
        >>> figure.axes[0].texts[0].get_text()
        '10 of 100'
    """
    figure, axes = panel(7.0, min(1.2 + 0.28 * len(rows), 400.0))  # a PNG has at most 2^16 rows
    names = [plain(row["name"]) for row in rows]
    axes.barh(names, [100 * row["sparsity"] for row in rows], color=BLUE)
    for y, row in enumerate(rows):
        kept = row["weights"] - row["zeros"]
        axes.text(101, y, f"{kept:,} of {row['weights']:,}", va="center", fontsize=8, color=GREY)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_xlabel("sparsity (%)")
    return figure


def stability(found: list[float]) -> Figure:
    """Plot the correlation of the mask after each epoch with the final mask; NaN leaves a gap.

    Args:
        found: result of `torch_feather.analysis.stability.correlations`.

    Example:
        >>> figure = stability([0.4, 0.8, 1.0])
        >>> figure.axes[0].get_lines()[0].get_xdata().tolist()  # epochs
        [1, 2, 3]
    """
    figure, axes = panel(6.4, 4.0)
    axes.plot(range(1, len(found) + 1), found, color=BLUE)
    axes.set_xlabel("epoch")
    axes.set_ylabel("correlation with the final mask")
    return figure


def operators(powers: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, float("inf"))) -> Figure:
    """Plot the power thresholds T_p(w; 1), which are soft at p = 1 and hard for p = ∞.

    Args:
        powers: values of p.

    Example:
        >>> axes = operators(powers=(1.0, float("inf"))).axes[0]
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['p = 1 (soft)', 'p = ∞ (hard)']
    """
    figure, axes = panel(5.2, 4.2)
    weights = torch.linspace(-3, 3, 1201)
    for i, p in enumerate(powers):
        effective = power_threshold(weights, torch.tensor(1.0), p)
        style = line_style(i) | {"marker": ""}
        axes.plot(weights, effective, label=power_name(p), **style)
    axes.set_xlabel("latent weight / threshold")
    axes.set_ylabel("effective weight / threshold")
    axes.legend(frameon=False, handlelength=3.2)
    return figure


def plain(text: str) -> str:
    """Return text for matplotlib, which reads text between two `$` as a formula.

    Example:
        >>> plain("a$b$")
        'a\\\\$b\\\\$'
    """
    return text.replace("$", r"\$")


def power_name(p: float) -> str:
    """Return the name of the power threshold with exponent p.

    Args:
        p: at least 1; may be infinite.

    Example:
        >>> power_name(1.0), power_name(3.0)
        ('p = 1 (soft)', 'p = 3')
    """
    return {1.0: "p = 1 (soft)", float("inf"): "p = ∞ (hard)"}.get(p, f"p = {p:g}")

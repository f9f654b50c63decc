"""The figure of the README, from recorded results.

    python docs/plot_overview.py

Reads results/cifar100-small/runs.json and results/deploy.json; writes docs/_static/overview.svg.
Its text is text, so that it can be read aloud, searched and tested.
"""

import io
import json
import statistics
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torch_feather.analysis.plots import COLOURS, GREY, PALE_GREY, adapt_colours

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).parent / "_static" / "overview.svg"
SHOWN = {"feather": COLOURS[0], "hard-ste": COLOURS[1], "soft-ste": COLOURS[2]}
SPARSITY = 0.98  # of the network with measured size and time


def accuracies() -> dict[str, dict[float, tuple[float, float]]]:
    """Return mean and standard deviation of the accuracy in % by method and sparsity."""
    rows = json.loads((ROOT / "results" / "cifar100-small" / "runs.json").read_text())
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        by_sparsity = found.setdefault(row["method"], {})
        by_sparsity.setdefault(row["sparsity"] or 0.0, []).append(100 * row["test_accuracy"])
    return {
        method: {s: (statistics.mean(a), statistics.stdev(a)) for s, a in by_sparsity.items()}
        for method, by_sparsity in found.items()
    }


def costs() -> dict[str, list[tuple[str, float, str]]]:
    """Return label, value and its text for the network of `accuracies`, dense and sparse."""
    rows = json.loads((ROOT / "results" / "deploy.json").read_text())["rows"]
    dense, sparse = (
        next(r for r in rows if r["data"] == "cifar100" and r["sparsity"] == s)
        for s in (0.0, SPARSITY)
    )
    zeros = f"{100 * SPARSITY:g}% zeros"
    return {
        "file": [
            ("dense", dense["bytes"], f"{dense['bytes'] / 1000:,.0f} kB"),
            (zeros, sparse["bytes"], f"{sparse['bytes'] / 1000:.0f} kB"),
        ],
        "one image on one CPU core": [
            ("dense, PyTorch", dense["pytorch_ms"], f"{dense['pytorch_ms']} ms"),
            ("dense, compiled", dense["compiled_ms"], f"{dense['compiled_ms']} ms"),
            (f"{zeros}, compiled", sparse["compiled_ms"], f"{sparse['compiled_ms']} ms"),
        ],
    }


def plot_accuracy(axes: Axes) -> None:
    """Plot accuracy over sparsity next to the dense network."""
    found = accuracies()
    (dense, deviation), *_ = found["dense"].values()
    ticks = sorted(found["feather"])
    axes.axhline(dense, color=GREY, linestyle=(0, (6, 3)), linewidth=1)
    axes.axhspan(dense - deviation, dense + deviation, color=GREY, alpha=0.15, linewidth=0)
    axes.text(len(ticks) - 0.25, dense + 0.9, f"dense {dense:.1f}%", ha="right", color=GREY)
    for name, colour in SHOWN.items():
        means, bars = zip(*(found[name][s] for s in ticks), strict=True)
        axes.errorbar(range(len(ticks)), means, bars, color=colour, capsize=2.5, marker="o", ms=4)
        shift = {"hard-ste": 1.0, "soft-ste": -1.0}.get(name, 0)
        axes.text(len(ticks) - 0.85, means[-1] + shift, name, va="center")
    for x, s in enumerate(ticks[:-1]):
        mean = found["feather"][s][0]
        axes.text(x + 0.06, mean + 0.9, f"{mean:.1f}%", color=COLOURS[0])
    axes.set_xticks(range(len(ticks)), [f"{100 * s:g}%" for s in ticks])
    axes.set_xlim(-0.25, len(ticks) - 0.15)
    axes.set_ylim(10, 53)
    axes.set_xlabel("weights that are exactly zero")
    axes.set_title("test accuracy (%), CIFAR-100 at 16×16, n = 3", loc="left", fontsize=10)
    axes.grid(color="#e5e5e5", linewidth=0.8)


def plot_costs(axes: Axes, title: str, bars: list[tuple[str, float, str]]) -> None:
    """Plot bars, the last one for the sparse network."""
    most = max(value for _, value, _ in bars)
    for y, (label, value, text) in enumerate(bars):
        colour = COLOURS[0] if y == len(bars) - 1 else PALE_GREY
        axes.barh(y, value / most, color=colour, height=0.42)
        axes.text(0, y - 0.3, label, va="bottom", fontsize=9)
        axes.text(value / most + 0.03, y, text, va="center", fontsize=9)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlim=(0, 1.4), ylim=(len(bars) - 0.6, -0.8), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)


def overview() -> str:
    """Return the figure as SVG."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "overview", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.2, 3.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        left, right = figure.subfigures(1, 2, width_ratios=(1.75, 1))
        axes = left.add_subplot()
        plot_accuracy(axes)
        panels = costs()
        heights = [len(bars) for bars in panels.values()]
        parts = right.subplots(len(panels), 1, height_ratios=heights)
        for part, (title, bars) in zip(parts, panels.items(), strict=True):
            plot_costs(part, title, bars)
        for part in (axes, *parts):
            part.spines[["top", "right"]].set_visible(False)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    plain = svg.getvalue().replace("'DejaVu Sans'", "system-ui, -apple-system, 'DejaVu Sans'")
    return adapt_colours(plain)


if __name__ == "__main__":
    TARGET.write_text(overview())
    print(TARGET)

"""Pictures of a run and of the operators, and how all pictures look (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..operators import power_threshold
from .stability import correlations, read_masks

# Of Okabe and Ito, told apart with all kinds of colour vision; markers and dashes help in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = "os^DvPX*<>"
BLUE, ORANGE, GREY = COLOURS[0], COLOURS[1], "#666666"


def look(i: int) -> dict[str, Any]:
    """Colour, dashes and marker of the i-th series; the first 49 differ also without markers."""
    return {
        "color": COLOURS[i % 7],
        "linestyle": DASHES[(i + i // 7) % 7],
        "marker": MARKERS[i % 10],
        "markersize": 5,
        "linewidth": 1.6,
    }


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one pair of axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def draw_run(folder: Path, history: list[dict[str, Any]], results: dict[str, Any]) -> list[Path]:
    """Write curves.png, layers.png and operator.png into `folder`; masks.png if it has masks."""
    figures = {
        "curves.png": curves(history, results),
        "layers.png": layers(results["report"]["layers"]),
        "operator.png": operators(),
    }
    if masks := read_masks(folder, len(history)):
        figures["masks.png"] = stability(correlations(masks, results["report"]["weights"]))
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def curves(history: list[dict[str, Any]], results: dict[str, Any]) -> Figure:
    """Accuracy and sparsity over epochs; of the test images where nothing is held out."""
    figure, axes = panel(6.4, 4.0)
    epochs = [line["epoch"] for line in history]
    held_out = any(line["val_acc"] is not None for line in history)
    key, name = ("val_acc", "validation") if held_out else ("test_acc", "test")
    measured = [(line["epoch"], 100 * line[key]) for line in history if line.get(key) is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), color=BLUE, label=f"{name} accuracy, %")
        axes.axhline(
            100 * results["test_accuracy"],
            color=BLUE,
            linestyle=":",
            label="test accuracy at the end, %",
        )
        axes.set_ylabel("accuracy, %")
    else:
        losses = [line["train_loss"] for line in history]
        axes.plot(epochs, losses, color=BLUE, label="training loss")
        axes.set_ylabel("training loss")
    if measured and "dense" in results:
        axes.axhline(
            100 * results["dense"]["test_accuracy"],
            color=GREY,
            linestyle=":",
            label="test accuracy of the dense network, %",
        )
    axes.set_xlabel("epoch")
    right = axes.twinx()
    right.plot(
        epochs, [100 * line["sparsity"] for line in history], color=ORANGE, label="sparsity, %"
    )
    right.set_ylabel("sparsity, %")
    right.set_ylim(0, 102)
    right.spines["top"].set_visible(False)
    handles = [*axes.get_lines(), *right.get_lines()]
    axes.legend(handles, [str(h.get_label()) for h in handles], loc="center right", frameon=False)
    axes.set_title(
        f"{results['network']} on {results['data']}, {results['method']}: "
        f"{100 * results['test_accuracy']:.1f} % on the test images"
    )
    return figure


def layers(rows: list[dict[str, Any]]) -> Figure:
    """Sparsity per layer, each bar labelled with the weights that are left."""
    figure, axes = panel(7.0, 1.2 + 0.28 * len(rows))
    names = [row["name"] for row in rows]
    axes.barh(names, [100 * row["sparsity"] for row in rows], color=BLUE)
    for place, row in enumerate(rows):
        left = row["weights"] - row["zeros"]
        axes.text(
            101, place, f"{left:,} of {row['weights']:,}", va="center", fontsize=8, color=GREY
        )
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_xlabel("weights that are zero, %")
    return figure


def stability(found: list[float]) -> Figure:
    """Correlation of the mask at the end of each epoch with the final one; nan leaves a gap."""
    figure, axes = panel(6.4, 4.0)
    axes.plot(range(1, len(found) + 1), found, color=BLUE)
    axes.set_xlabel("epoch")
    axes.set_ylabel("correlation of the mask with the final one")
    return figure


def operators(powers: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, float("inf"))) -> Figure:
    """The threshold family T_p(w; 1): soft at p = 1, hard in the limit."""
    figure, axes = panel(5.2, 4.2)
    weights = torch.linspace(-3, 3, 1201)
    for i, p in enumerate(powers):
        image = power_threshold(weights, torch.tensor(1.0), p)
        style = look(i) | {"marker": ""}
        axes.plot(weights, image, label=power_name(p), **style)
    axes.set_xlabel("latent weight, in units of the threshold")
    axes.set_ylabel("effective weight")
    axes.legend(frameon=False, handlelength=3.2)
    return figure


def power_name(p: float) -> str:
    """What a threshold of the family is called."""
    return {1.0: "p = 1 (soft)", float("inf"): "p = ∞ (hard)"}.get(p, f"p = {p:g}")

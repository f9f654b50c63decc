"""Pictures of a run and of the operators (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..operators import power_threshold

BLUE, ORANGE, GREY, GREEN = "#2b6cb0", "#dd6b20", "#718096", "#38a169"


def draw_run(folder: Path, history: list[dict[str, Any]], results: dict[str, Any]) -> list[Path]:
    """Write curves.png, layers.png and operator.png into `folder`."""
    figures = {
        "curves.png": curves(history, results),
        "layers.png": layers(results["report"]["layers"]),
        "operator.png": operators(),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def curves(history: list[dict[str, Any]], results: dict[str, Any]) -> Figure:
    """Accuracy and sparsity over epochs; of the test images where nothing is held out."""
    figure, axes = _figure(6.4, 4.0)
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
    figure, axes = _figure(7.0, 1.2 + 0.28 * len(rows))
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


def operators(powers: tuple[float, ...] = (1.0, 2.0, 3.0, float("inf"))) -> Figure:
    """The threshold family T_p(w; 1): soft at p = 1, hard in the limit."""
    figure, axes = _figure(5.0, 4.0)
    weights = torch.linspace(-3, 3, 1201)
    names = {1.0: "p = 1 (soft)", float("inf"): "p = ∞ (hard)"}
    colours = {1.0: GREY, 2.0: BLUE, 3.0: ORANGE, float("inf"): GREEN}
    for p in powers:
        image = power_threshold(weights, torch.tensor(1.0), p)
        axes.plot(
            weights,
            image,
            label=names.get(p, f"p = {p:g}"),
            color=colours.get(p),
            linewidth=2.2 if p == 3.0 else 1.1,
        )
    axes.set_xlabel("latent weight, in units of the threshold")
    axes.set_ylabel("effective weight")
    axes.legend(frameon=False)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes

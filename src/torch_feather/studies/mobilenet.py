"""Table 2 of the supplement: MobileNetV1 at 89% and 94.1% sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..analysis.plots import GREY, panel
from ..training import Config
from . import compare
from .comparison import compare_pairs
from .descriptions import DESCRIPTIONS
from .figures import accuracy_figure, label_lines, loss_figure, published_styles
from .published import MOBILENET, MOBILENET_DENSE, SUPPLEMENT
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, StudyFigure, Table
from .summary import accuracy_table, percent

SPARSITIES = (0.89, 0.941)


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan each method on MobileNetV1: the ImageNet variant for image folders, else CIFAR's."""
    large = config.data.name == "imagefolder"
    network = "timm/mobilenetv1_100" if large else "mobilenet_v1"
    return compare.plan(replace(config, network=network), axes)


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return the measured results, and the published table in its own section."""
    sentences, differences = compare_pairs(rows, compare.first_with_others(rows))
    figures = [*accuracy_figure(rows), *loss_figure(rows)]
    measured = Section(figures, [accuracy_table(rows), *differences])
    return Answer(sentences, measured, _published(rows))


def _published(rows: Sequence[Row]) -> Section:
    """Return Table 2 of the supplement as figure and table.

    Args:
        rows: the study's runs, whose line styles are used for the same methods.
    """
    figure, axes = panel(5.2, 4.2)
    best_first = MOBILENET[::-1]
    for series, style in zip(best_first, published_styles(best_first, rows), strict=True):
        at = [SPARSITIES.index(point.sparsity) for point in series.points]
        axes.plot(at, [p.accuracy for p in series.points], label=series.title, **style)
    axes.axhline(MOBILENET_DENSE, color=GREY, linestyle=(0, (6, 3)), linewidth=1, label="dense")
    axes.set_xticks(range(2), [percent(s) for s in SPARSITIES])
    axes.set_xlim(-0.5, 1.5)
    axes.set(xlabel="sparsity", ylabel="top-1 accuracy on ImageNet (%)")
    label_lines(axes)
    lines = [["dense", f"{MOBILENET_DENSE:.2f}", ""]]
    for series in MOBILENET:
        found = {point.sparsity: f"{point.accuracy:.2f}" for point in series.points}
        lines.append([series.title, *(found.get(sparsity, "–") for sparsity in SPARSITIES)])
    caption = f"Top-1 accuracy on ImageNet (%): Table 2, {SUPPLEMENT}"
    return Section(
        [StudyFigure("published", figure, "Published: MobileNetV1 on ImageNet, 100 epochs.")],
        [Table(caption, ["method", *map(percent, SPARSITIES)], lines)],
    )


MOBILENET_STUDY = Study(**vars(DESCRIPTIONS["mobilenet"]), plan=_plan, answer=_answer)

"""The main comparison on the paper's three CIFAR networks, over sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..training import Config
from . import compare
from .comparison import compare_pairs
from .descriptions import DESCRIPTIONS
from .figures import plot_over_sparsity
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, StudyFigure
from .summary import accuracy_table, labels

NETWORKS = {
    "resnet20": "ResNet-20",
    "mobilenet_v1": "MobileNetV1",
    "densenet40_24": "DenseNet40-24",
}


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan each method on each network, with seeds as the outermost loop."""
    runs = [run for n in NETWORKS for run in compare.plan(replace(config, network=n), axes)]
    return sorted(runs, key=lambda run: axes.seeds.index(run.config.seed))


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return a figure and tables for each network."""
    sentences, figures, tables = [], [], []
    for network, title in NETWORKS.items():
        mine = [row for row in rows if row["network"] == network]
        if not mine:
            continue
        found, differences = compare_pairs(mine, compare.first_with_others(mine))
        sentences += [f"{title}: {sentence}" for sentence in found]
        tables.append(accuracy_table(mine, f"{title}: test accuracy"))
        tables += [replace(table, caption=f"{title}: {table.caption}") for table in differences]
        if labels(mine):
            caption = f"{title}: mean over seeds; bars: ± one standard deviation."
            figures.append(StudyFigure(network, plot_over_sparsity(mine), caption))
    return Answer(sentences, Section(figures, tables))


NETWORKS_STUDY = Study(**vars(DESCRIPTIONS["networks"]), plan=_plan, answer=_answer)

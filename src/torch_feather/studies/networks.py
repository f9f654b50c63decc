"""The main comparison: the paper's three CIFAR networks over sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..training.config import Config
from . import compare
from .figures import over_sparsity
from .grid import Row, Run
from .spread import accuracy_table, against, labels
from .study import Answer, Choices, Part, Picture, Study

NETWORKS = {
    "resnet20": "ResNet-20",
    "mobilenet_v1": "MobileNetV1",
    "densenet40_24": "DenseNet40-24",
}


def plan(config: Config, choices: Choices) -> list[Run]:
    """Each method on each network, seeds outermost."""
    runs = [run for n in NETWORKS for run in compare.plan(replace(config, network=n), choices)]
    return sorted(runs, key=lambda run: choices.seeds.index(run.config.seed))


def answer(rows: Sequence[Row], config: Config) -> Answer:
    """A picture and a table for each network."""
    sentences, pictures, tables = [], [], []
    for network, name in NETWORKS.items():
        mine = [row for row in rows if row["network"] == network]
        if not mine:
            continue
        told, differences = against(mine, compare.first_and_others(mine))
        sentences += [f"{name}: {sentence}" for sentence in told]
        tables.append(accuracy_table(mine, name))
        tables += [replace(table, caption=f"{name}: {table.caption}") for table in differences]
        if labels(mine):
            caption = f"{name}: mean over seeds; bars: ± one standard deviation."
            pictures.append(Picture(network, over_sparsity(mine), caption))
    return Answer(sentences, Part(pictures, tables))


NETWORKS_STUDY = Study(
    name="networks",
    question="Is Feather ahead on different networks, from 90 to 99.5 % of their weights zero?",
    reading="ResNet-20 is a plain residual network, MobileNetV1 is made to be small already, "
    "DenseNet40-24 reuses its features. All are trained by one recipe.",
    source="The paper's main comparison",
    plan=plan,
    answer=answer,
    methods="dense,feather,gmp,st3",
    small={"epochs": 6},
    decides=("network",),
    small_sparsities="0.9,0.98",
)

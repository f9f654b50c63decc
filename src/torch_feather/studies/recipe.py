"""Table 1 of the supplement: the hyper-parameters, as they are in force here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..training.config import Config, resolve_config
from .grid import Row, Run
from .published import HYPERPARAMETERS, SUPPLEMENT
from .study import Answer, Choices, Part, Study, Table

RECIPES = {"CIFAR-100": "cifar100", "ImageNet": "imagenet"}


def plan(config: Config, choices: Choices) -> list[Run]:
    """Nothing to train."""
    return []


def answer(rows: Sequence[Row], config: Config) -> Answer:
    """The recipes' values beside each other, and whether they are the published ones."""
    ours = {f"recipe {name}": in_force(resolve_config(name)) for name in RECIPES.values()}
    here = f"recipe {config.recipe}"
    if ours.get(here) != in_force(config):
        ours["here" if here in ours else here] = in_force(config)
    sentences = []
    for data, name in RECIPES.items():
        mine = ours[f"recipe {name}"]
        differs = [
            f"{key} is {mine[key]}, not {value}"
            for key, value in HYPERPARAMETERS[data].items()
            if mine[key] != value and not mine[key].startswith(f"{value} of ")
        ]
        told = "; ".join(differs) or "every value is the published one"
        sentences.append(f"Recipe {name}, for {data}: {told}.")
    return Answer(
        sentences,
        Part(tables=[_columns("In force here", ours)]),
        Part(tables=[_columns(f"Table 1, {SUPPLEMENT}", HYPERPARAMETERS)]),
    )


def in_force(config: Config) -> dict[str, str]:
    """The settings that Table 1 has, then those that it leaves open."""
    optimizer, data = config.optimizer, config.data
    warmup = f", warm-up of {optimizer.warmup_epochs:g} epochs" * (optimizer.warmup_epochs > 0)
    crop = f"random crop, padding {data.shift}" if data.crop == "shift" else "random resized crop"
    return {
        "epochs": str(config.epochs),
        "batch size": str(config.batch_size),
        "weight decay": f"{optimizer.weight_decay:g}",
        "optimizer": "SGD, Nesterov" if optimizer.nesterov else "SGD",
        "learning rate": f"{optimizer.lr:g}",
        "schedule": f"cosine{warmup}",
        "momentum": f"{optimizer.momentum:g}",
        "label smoothing": f"{optimizer.label_smoothing:g}"
        if optimizer.label_smoothing
        else "none",
        "gradient norm clipped at": "not" if optimizer.clip is None else f"{optimizer.clip:g}",
        "training images": crop + ", flip" * data.flip,
        "held out for validation": f"{100 * data.validation:g} %",
        "network": config.network,
    }


def _columns(caption: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    keys = list(next(iter(columns.values())))
    rows = [[key, *(column[key] for column in columns.values())] for key in keys]
    return Table(caption, ["", *columns], rows)


RECIPE = Study(
    name="recipe",
    question="With which hyper-parameters are the networks trained?",
    reading="The same ones for every network and every sparsity; nothing here is tuned to either. "
    "No training is needed for this page.",
    source="Table 1 of the supplement",
    plan=plan,
    answer=answer,
    small={},
)

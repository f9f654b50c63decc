"""Table 1 of the supplement: hyper-parameters of the recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..training import Config, resolve_config
from .descriptions import DESCRIPTIONS
from .published import HYPERPARAMETERS, SUPPLEMENT
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study, Table

RECIPES = {"CIFAR-100": "cifar100", "ImageNet": "imagenet"}


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Return no runs; the study compares settings."""
    return []


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return the recipes' hyper-parameters and whether they equal the published ones."""
    recipes = {
        f"recipe {name}": _hyperparameters(resolve_config(name)) for name in RECIPES.values()
    }
    name = f"recipe {config.recipe}"
    if recipes.get(name) != _hyperparameters(config):
        recipes["command line" if name in recipes else name] = _hyperparameters(config)
    sentences = []
    for data, recipe in RECIPES.items():
        mine = recipes[f"recipe {recipe}"]
        differences = [
            f"{key} is {mine[key]}, published {value}"
            for key, value in HYPERPARAMETERS[data].items()
            if mine[key] != value and not mine[key].startswith(f"{value} of ")
        ]
        result = "; ".join(differences) or "all values equal the published ones"
        sentences.append(f"Recipe {recipe} for {data}: {result}.")
    return Answer(
        sentences,
        Section(tables=[_columns("Recipes of this version", recipes)]),
        Section(tables=[_columns(f"Table 1, {SUPPLEMENT}", HYPERPARAMETERS)]),
    )


def _hyperparameters(config: Config) -> dict[str, str]:
    """Return the settings of Table 1, then settings that it leaves open."""
    optimizer, data = config.optimizer, config.data
    warmup = f", warm-up of {optimizer.warmup_epochs:g} epochs" * (optimizer.warmup_epochs > 0)
    crop = f"random crop, padding {data.shift}" if data.crop == "shift" else "random resized crop"
    smoothing = f"{optimizer.label_smoothing:g}" if optimizer.label_smoothing else "none"
    return {
        "epochs": str(config.epochs),
        "batch size": str(config.batch_size),
        "weight decay": f"{optimizer.weight_decay:g}",
        "optimizer": "SGD, Nesterov" if optimizer.nesterov else "SGD",
        "learning rate": f"{optimizer.lr:g}",
        "schedule": f"cosine{warmup}",
        "momentum": f"{optimizer.momentum:g}",
        "label smoothing": smoothing,
        "gradient norm clipping": "none" if optimizer.clip is None else f"{optimizer.clip:g}",
        "training images": crop + ", flip" * data.flip,
        "validation fraction": f"{100 * data.validation:g}%",
        "network": config.network,
    }


def _columns(caption: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    keys = list(next(iter(columns.values())))
    rows = [[key, *(column[key] for column in columns.values())] for key in keys]
    return Table(caption, ["setting", *columns], rows)


RECIPE = Study(**vars(DESCRIPTIONS["recipe"]), plan=_plan, answer=_answer)

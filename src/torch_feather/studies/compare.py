"""Methods beside each other, on one budget."""

from __future__ import annotations

from collections.abc import Sequence

from ..training.config import DENSE, Config
from .figures import every_seed, over_epochs, over_sparsity
from .grid import Row, Run
from .spread import accuracy_table, against, labels, percent, sparsities
from .study import Answer, Choices, Part, Picture, Study, grid


def plan(config: Config, choices: Choices) -> list[Run]:
    """Each method at each sparsity."""
    return grid(config, choices.variants, choices)


def answer(rows: Sequence[Row], config: Config) -> Answer:
    """Accuracy over sparsity, training loss at the highest one, every seed."""
    sentences, differences = against(rows, first_and_others(rows))
    pictures = [*accuracy_pictures(rows), *seeds_pictures(rows)]
    return Answer(sentences, Part(pictures, [accuracy_table(rows), *differences]))


def first_and_others(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The first sparse method of the plan beside each of the others."""
    names = labels(rows)
    return [(names[0], other) for other in names[1:]]


def accuracy_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Accuracy over sparsity, and the training loss at the highest."""
    if not labels(rows):
        return []
    highest = sparsities(rows)[-1]
    losses: dict[str, list[list[float | None]]] = {}
    for row in rows:
        if row["method"] != DENSE and row["sparsity"] == highest:
            losses.setdefault(row["label"], []).append(row["curve"]["train_loss"])
    return [
        Picture(
            "accuracy",
            over_sparsity(rows),
            "Test accuracy after the last epoch: mean over seeds; bars: ± one standard deviation.",
        ),
        Picture(
            "loss",
            over_epochs(losses, f"training loss at {percent(highest)}"),
            f"Training loss at {percent(highest)}: mean over seeds; bands: ± one standard "
            "deviation.",
        ),
    ]


def seeds_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Every run, for each sparsity."""
    return [
        Picture(
            f"seeds-{100 * sparsity:g}",
            every_seed(rows, sparsity),
            f"At {percent(sparsity)}: every seed a dot, their mean a stroke; dashed: dense.",
        )
        for sparsity in sparsities(rows)
    ]


COMPARE = Study(
    name="compare",
    question="Which method trains the most accurate sparse network on one budget?",
    reading="Every method prunes the same network on the same budget: the same images, epochs and "
    "learning rates.",
    source="The paper's main comparison",
    plan=plan,
    answer=answer,
    methods="dense,feather,hard-ste,soft-ste",
)

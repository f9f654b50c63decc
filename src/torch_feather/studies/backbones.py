"""Figure 3 of the supplement: Feather as a module in other pruning methods."""

from __future__ import annotations

from collections.abc import Sequence

from ..training.config import DENSE, Config
from .figures import over_sparsity
from .grid import Row, Run
from .spread import accuracy_table, against, labels
from .study import Answer, Choices, Part, Picture, Study, grid

PAIRS = {"gmp": "feather-gmp", "asl+": "feather-asl+"}


def plan(config: Config, choices: Choices) -> list[Run]:
    """Each backbone alone and with Feather."""
    methods = [DENSE, *(name for pair in PAIRS.items() for name in pair)]
    return grid(config, {method: {"method": method} for method in methods}, choices)


def answer(rows: Sequence[Row], config: Config) -> Answer:
    """Figure 3 a and b."""
    pictures = []
    for alone, joined in PAIRS.items():
        both = [row for row in rows if row["label"] in (alone, joined, DENSE)]
        if not labels(both):
            continue
        pictures.append(
            Picture(
                alone.replace("+", "-plus"),
                over_sparsity(both),
                f"{alone} alone and with Feather: mean over seeds; bars: ± one standard deviation.",
            )
        )
    sentences, differences = against(rows, [(joined, alone) for alone, joined in PAIRS.items()])
    return Answer(sentences, Part(pictures, [accuracy_table(rows), *differences]))


BACKBONES = Study(
    name="backbones",
    question="Does Feather improve other pruning methods when it is built into them?",
    reading="gmp prunes every layer to the same sparsity by magnitude; asl+ learns a threshold for "
    "each layer. With Feather they decide the same things, but weights pass through its threshold, "
    "and gradients come back as it prescribes.",
    source="Figure 3 of the supplement",
    plan=plan,
    answer=answer,
)

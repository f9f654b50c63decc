"""Accuracy against measured milliseconds, next to multiply-adds."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..runtime import compile_sparse
from ..runtime.kernels import llvm
from ..runtime.timing import alternate
from ..training.checkpoint import RunDirectory, write_json
from ..training.config import DENSE, Config
from ..training.export_run import load_network
from ..training.provenance import provenance
from .flops import BIASED, GREY_IS, MULTIPLY_ADDS, Cost, drawn, on_the_frontier
from .grid import Row, Run
from .spread import accuracy_table, with_spread
from .study import Answer, Choices, Part, Study, grid

MILLISECONDS = Cost("milliseconds", 1.0, "ms", "milliseconds an image (logarithmic)")


def plan(config: Config, choices: Choices) -> list[Run]:
    """Each method; the one that knows costs with multiply-adds, and with milliseconds.

    Raises:
        RuntimeMissingError: nothing could be timed after all the training.
    """
    llvm()
    variants: dict[str, dict] = {}
    for label, variant in choices.variants.items():
        variants[label] = variant
        if label == BIASED:
            timed = {"method": BIASED, "options": {"costs": "milliseconds"}}
            variants[f"{BIASED} (milliseconds)"] = timed
    return grid(config, variants, choices)


def measure(row: Row, run: Path, out: Path, data_path: str | None) -> Row:
    """What the network of a run takes on this CPU, for one image in one thread.

    It is kept in `out`/timings, with how each layer runs, and is measured again for another network
    or on another CPU.
    """
    file = out / "timings" / f"{row['name']}.json"
    directory = RunDirectory(run)
    weights = hashlib.sha256(directory.model_file.read_bytes()).hexdigest()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = provenance(torch.device("cpu"))
        found = json.loads(file.read_text()) if file.exists() else {}
        if (found.get("weights"), found.get("cpu")) != (weights, made["hardware"]["cpu"]):
            model, x = load_network(directory, data_path)
            model.eval()
            x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            sparse = compile_sparse(model, x, threads=1)
            with torch.inference_mode():
                calls = [lambda: sparse(x), lambda: model(x)]
                ours, pytorch = alternate(calls, rounds=30)
            found = {
                "milliseconds": ours,
                "pytorch_milliseconds": pytorch,
                "weights": weights,
                "cpu": made["hardware"]["cpu"],
                "commit": made["commit"],
                "versions": made["versions"],
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            sparse.save_choices(file.with_suffix(".choices.json"))
            write_json(file, found)
    finally:
        torch.set_num_threads(threads)
    keys = ("milliseconds", "pytorch_milliseconds")
    return {key: found[key] for key in keys} | {"timed_on": found["cpu"]}


def answer(rows: Sequence[Row], config: Config) -> Answer:
    """The accuracy over either cost."""
    where = ", ".join(sorted({row["timed_on"] for row in rows}))
    means = "means over seeds; bars: ± one standard deviation of both."
    milliseconds = (
        f"Test accuracy against measured milliseconds of one image, one thread of {where}; "
        f"{means} {GREY_IS}"
    )
    same = f"The same networks against their multiply-adds; {means}"
    pictures = [
        *drawn("milliseconds", rows, MILLISECONDS, milliseconds),
        *drawn("multiply-adds", rows, MULTIPLY_ADDS, same),
    ]
    columns: list[tuple[str, Callable[[Sequence[Row]], str]]] = [
        ("ms", lambda found: with_spread([row["milliseconds"] for row in found], 3)),
        ("in PyTorch, ms", lambda found: f"{_pytorch(found):.3f}"),
    ]
    dense = [row for row in rows if row["method"] == DENSE]
    if dense:
        base = MILLISECONDS.mean(dense)
        columns += [("times dense", lambda found: f"{base / MILLISECONDS.mean(found):.2f}")]
    caption = f"Test accuracy, and milliseconds of one image: one thread of {where}"
    return Answer(
        on_the_frontier(rows, MILLISECONDS),
        Part(pictures, [accuracy_table(rows, caption, columns)]),
    )


def _pytorch(rows: Sequence[Row]) -> float:
    return statistics.mean(row["pytorch_milliseconds"] for row in rows)


LATENCY = Study(
    name="latency",
    question="Which method gives the most accurate network for its milliseconds on this CPU?",
    reading="Every network runs as feather.compile_sparse makes it, the dense one too: zeros are "
    "left out where that is faster. A multiply-add does not take equally long in every layer, so "
    "the two pictures may differ. feather-flops aims at few multiply-adds, or at few milliseconds, "
    "measured for each layer before the training.",
    source="Beyond Figure 4 of the supplement",
    plan=plan,
    answer=answer,
    measure=measure,
    methods="dense,feather,feather-flops",
)

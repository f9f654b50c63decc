"""Accuracy against measured latency, next to multiply-adds."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..runtime import compile_sparse
from ..runtime.kernels import llvm
from ..runtime.timing import alternate
from ..training import Config
from ..training.checkpoint import RunDirectory, write_json
from ..training.config import DENSE
from ..training.content import read_json
from ..training.export_run import load_network
from ..training.provenance import provenance
from ..training.schemas import TIMING
from .descriptions import DESCRIPTIONS
from .flops import BIASED
from .pareto import FRONT_NOTE, MILLISECONDS, MULTIPLY_ADDS, cost_figures, front_sentences
from .planning import grid
from .runs import Row, Run
from .study import Answer, GridAxes, Section, Study
from .summary import Column, accuracy_table, with_deviation

MEASURED = ("milliseconds", "pytorch_milliseconds")


def _plan(config: Config, axes: GridAxes) -> list[Run]:
    """Plan each method, feather-flops with both costs: multiply-adds and milliseconds.

    Raises:
        RuntimeMissingError: the CPU runtime is not installed, so networks cannot be timed.
    """
    llvm()  # fail before the training, not after it
    variants: dict[str, dict] = {}
    for label, variant in axes.variants.items():
        variants[label] = variant
        if label == BIASED:
            timed = {"method": BIASED, "options": {"costs": "milliseconds"}}
            variants[f"{BIASED} (milliseconds)"] = timed
    return grid(config, variants, axes)


def _measure(row: Row, run: Path, out: Path, data_path: str | None) -> Row:
    """Measure the latency of a run's network: one image, one thread of this CPU.

    The result and the tuning results are stored in `out`/timings. A network with a stored result
    from the same CPU is not measured again.

    Args:
        row: the row of the run.
        run: its run directory.
        out: output directory of the study.
        data_path: path of the data.

    Returns:
        The keys to add to the row.
    """
    file = out / "timings" / f"{row['name']}.json"
    directory = RunDirectory(run)
    weights = hashlib.sha256(directory.model_file.read_bytes()).hexdigest()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        facts = provenance(torch.device("cpu"))
        cpu = facts["hardware"]["cpu"]
        found = _stored(file)
        if (found.get("weights"), found.get("cpu")) != (weights, cpu):
            found = _time(directory, file, data_path) | {
                "weights": weights,
                "cpu": cpu,
                "commit": facts["commit"],
                "versions": facts["versions"],
            }
            write_json(file, found)
    finally:
        torch.set_num_threads(threads)
    return {key: found[key] for key in MEASURED} | {"timed_on": found["cpu"]}


def _stored(file: Path) -> dict[str, Any]:
    try:
        return read_json(file, TIMING, "Remove the file to measure the network again.")
    except FileNotFoundError:
        return {}


def _time(directory: RunDirectory, file: Path, data_path: str | None) -> dict[str, Any]:
    """Return the median milliseconds of a network with the CPU runtime and with PyTorch."""
    model, x = load_network(directory, data_path)
    model.eval()
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    sparse = compile_sparse(model, x, threads=1)
    with torch.inference_mode():
        times = alternate([lambda: sparse(x), lambda: model(x)], rounds=30)
    file.parent.mkdir(parents=True, exist_ok=True)
    sparse.save_tuning(file.with_suffix(".tuning.json"))
    return dict(zip(MEASURED, times, strict=True))


def _answer(rows: Sequence[Row], config: Config) -> Answer:
    """Return accuracy over latency and over multiply-adds."""
    cpu = ", ".join(sorted({row["timed_on"] for row in rows}))
    means = "means over seeds; bars: ± one standard deviation of both."
    latency = f"Test accuracy against latency (one image, one thread of {cpu}): {means}"
    same = f"Test accuracy of the same networks against multiply-adds: {means}"
    figures = [
        *cost_figures("milliseconds", rows, MILLISECONDS, f"{latency} {FRONT_NOTE}"),
        *cost_figures("multiply-adds", rows, MULTIPLY_ADDS, f"{same} {FRONT_NOTE}"),
    ]
    columns: list[Column] = [
        ("ms", lambda found: with_deviation([row["milliseconds"] for row in found], 3)),
        ("ms in PyTorch", lambda found: f"{_pytorch(found):.3f}"),
    ]
    dense = [row for row in rows if row["method"] == DENSE]
    if dense:
        base = MILLISECONDS.mean(dense)
        columns += [("speedup", lambda found: f"{base / MILLISECONDS.mean(found):.2f}×")]
    caption = f"Test accuracy and latency: one image, one thread of {cpu}"
    return Answer(
        front_sentences(rows, MILLISECONDS),
        Section(figures, [accuracy_table(rows, caption, columns)]),
    )


def _pytorch(rows: Sequence[Row]) -> float:
    return statistics.mean(row["pytorch_milliseconds"] for row in rows)


LATENCY = Study(**vars(DESCRIPTIONS["latency"]), plan=_plan, answer=_answer, measure=_measure)

"""Milliseconds of trained networks with the CPU runtime and with PyTorch, stored next to a page."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..runtime import compile_sparse
from ..runtime.timing import alternate
from ..training.checkpoint import RunDirectory, write_json
from ..training.config import DENSE
from ..training.content import read_json
from ..training.export_run import load_network
from ..training.provenance import provenance
from ..training.schemas import TIMING
from .pareto import MILLISECONDS
from .runs import Row
from .summary import Column, with_deviation

MEASURED = ("milliseconds", "pytorch_milliseconds")


def measure(row: Row, run: Path, out: Path, data_path: str | None, time: bool = True) -> Row:
    """Return the latency of a run's network: one sample, one thread of this CPU.

    The result and the tuning results are stored in `out`/timings. A network with a stored result
    from the same CPU is not measured again.

    Args:
        row: the row of the run.
        run: its run directory.
        out: output directory of the study.
        data_path: path of the data.
        time: whether to time a network without a stored result.

    Returns:
        The keys to add to the row, in milliseconds; none if nothing is stored and `time` is false.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "model.safetensors").write_bytes(b"")
        >>> measure({"name": "digits-gmp-0.9-0"}, folder, folder, None, time=False)
        {}
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
            if not time:
                return {}
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
    if x.is_floating_point():
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    sparse = compile_sparse(model, x, threads=1)
    with torch.inference_mode():
        times = alternate([lambda: sparse(x), lambda: model(x)], rounds=30)
    file.parent.mkdir(parents=True, exist_ok=True)
    sparse.save_tuning(file.with_suffix(".tuning.json"))
    return dict(zip(MEASURED, times, strict=True))


def latency_columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of a table of timed networks, of which the dense one is the reference.

    Args:
        rows: rows with the keys of `measure`.

    Example:
        >>> rows = [{"method": "dense", "milliseconds": 2.0}, {"method": "x", "milliseconds": 1.0}]
        >>> [(name, text(rows[1:])) for name, text in latency_columns(rows) if name == "speedup"]
        [('speedup', '2.00×')]
    """

    def pytorch(found: Sequence[Row]) -> str:
        return f"{statistics.mean(row['pytorch_milliseconds'] for row in found):.3f}"

    columns: list[Column] = [
        ("ms", lambda found: with_deviation([row["milliseconds"] for row in found], 3)),
        ("ms in PyTorch", pytorch),
    ]
    if dense := [row for row in rows if row["method"] == DENSE]:
        base = MILLISECONDS.mean(dense)
        columns += [("speedup", lambda found: f"{base / MILLISECONDS.mean(found):.2f}×")]
    return columns

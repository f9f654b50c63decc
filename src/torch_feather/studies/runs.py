"""Training runs of a study, and the rows that record their results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.stability import correlations, read_masks
from ..errors import ConfigurationError
from ..training import Config
from ..training.checkpoint import RunDirectory, changed_keys
from ..training.config import DENSE, apply, flatten, to_dict
from ..training.content import anything, items, mapping, read_json
from ..training.errors import RunError
from ..training.schemas import ROW
from .options import current_option

Row = dict[str, Any]

RENAMED_KEYS = {"own_sparsity": "learned_sparsity"}  # version 0.1: this version
CURVES = ("epoch", "train_loss", "val_loss", "val_acc", "test_acc", "sparsity")


@dataclass(frozen=True)
class Run:
    """A training run of a study.

    Attributes:
        name: name of its run directory.
        config: full configuration.
        label: name in tables and figures.

    Example:
        >>> run = Run("digits-gmp-0.9-0", Config(method="gmp", sparsity=0.9), "gmp")
        >>> run.config.sparsity
        0.9
    """

    name: str
    config: Config
    label: str


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a runs.json file, also of one written by version 0.1.

    Args:
        path: the file.

    Returns:
        One row for each run, with the keys of this version.

    Raises:
        RunError: the file cannot be read or is not the runs.json file of a study.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs.json"
        >>> _ = path.write_text('[{"name": "a"}]')
        >>> try:
        ...     read_rows(path)
        ... except RunError as error:
        ...     print(error)
        /...runs.json: cannot be used: row[0] lacks label, data, ...
    """
    try:
        return read_json(path, _rows, "Give the runs.json that a study wrote, or leave --rows out.")
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None


def _rows(value: Any, at: str) -> None:
    """Check the content of runs.json, and give the keys of its rows their present names."""
    items(mapping(anything))(value, at)
    for row in value:
        for old, new in RENAMED_KEYS.items():
            if old in row:
                row[new] = row.pop(old)
    items(ROW)(value, "row")


def row_of(run: Run, directory: RunDirectory) -> Row:
    """Return the row of a finished run: its results, settings, curves and provenance.

    Args:
        run: the planned run.
        directory: its run directory.

    Raises:
        RunError: the run should have recorded its masks, and some are missing.

    Example:
        >>> import tempfile
        >>> from ..training.checkpoint import write_json
        >>> from ..training.schemas import example_results
        >>> config = Config(method="gmp", sparsity=0.9, epochs=1)
        >>> directory = RunDirectory(tempfile.mkdtemp())
        >>> results = example_results(method="gmp", target_sparsity=0.9, weights=100, zeros=90)
        >>> write_json(directory.report_file, results)
        >>> metrics = {"epoch": 1, "step": 1, "train_loss": 2.0, "val_acc": None, "sparsity": 0.9}
        >>> directory.write_metrics([metrics])
        >>> row = row_of(Run("digits-gmp-0.9-0", config, "gmp"), directory)
        >>> row["sparsity"], row["macs"], row["seconds"], row["curve"]["train_loss"]
        (0.9, 10, 1.0, [2.0])
    """
    results, metrics = directory.read_report(), directory.read_metrics()
    if len(metrics) != results["epochs"]:
        raise RunError(
            f"{directory.metrics_file}: has {len(metrics)} lines, but report.json names "
            f"{results['epochs']} epochs. Remove {directory.path} to train the run again."
        )
    report = results["report"]
    curve = {key: [line.get(key) for line in metrics] for key in CURVES}
    masks = read_masks(directory.path, results["epochs"], report["weights"])
    if masks is not None:
        found = correlations(masks, report["weights"])
        curve["mask_correlation"] = [None if math.isnan(r) else r for r in found]
    elif _needs_masks(run):
        raise RunError(
            f"{directory.path}: was trained without --track-masks, at least in part. Remove it to "
            "train the run again, or choose another --runs directory."
        )
    return {
        "name": run.name,
        "label": run.label,
        "data": run.config.data.title,
        "amp": run.config.system.amp,
        "select": run.config.select,
        "config": _recorded_settings(run.config),
        **{key: results[key] for key in ("network", "method", "seed", "epochs")},
        "sparsity": 0.0 if results["method"] == DENSE else results["target_sparsity"],
        "learned_sparsity": results.get("learned_sparsity", results.get("own_sparsity")),
        **{key: results[key] for key in ("test_accuracy", "test_loss", "train_loss")},
        "weights": report["weights"],
        "zeros": report["zeros"],
        "macs": results["macs"]["sparse"],
        "dense_macs": results["macs"]["dense"],
        "seconds": round(results["seconds"], 1),
        "curve": curve,
        **{key: results[key] for key in ("commit", "versions", "hardware")},
    }


def row_matches(row: Row, run: Run) -> bool:
    """Return whether a recorded row has the settings of `run`, and its masks if it needs them.

    Args:
        row: a row of `row_of` or `read_rows`.
        run: the planned run.

    Example:
        >>> row = {"name": "a", "amp": False, "config": {"sparsity": 0.9}, "curve": {}}
        >>> row_matches(row, Run("a", Config(sparsity=0.9), "feather"))
        True
        >>> row_matches(row, Run("a", Config(sparsity=0.95), "feather"))
        False
    """
    if row["name"] != run.name or row["amp"] != run.config.system.amp:
        return False
    if _needs_masks(run) and "mask_correlation" not in row["curve"]:
        return False
    try:
        recorded = apply(Config(), _current_settings(row["config"]), row["name"])
        return not changed_keys(recorded, run.config.written_out())
    except ConfigurationError:  # the row has settings or a method that no longer exist
        return False


def _needs_masks(run: Run) -> bool:
    return run.config.track_masks and run.config.method != DENSE


def _current_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings with option names of version 0.1 replaced."""
    method, prefix = str(settings.get("method", DENSE)), "options."
    return {
        prefix + current_option(method, key.removeprefix(prefix))
        if key.startswith(prefix)
        else key: value
        for key, value in settings.items()
    }


def _recorded_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine a run's result, without paths and system settings."""
    omitted = ("data.path", "compare_dense", "track_masks")
    return {
        key: value
        for key, value in flatten(to_dict(config.written_out())).items()
        if not key.startswith("system.") and key not in omitted
    }

"""Cost model of a sparse step on sharded weights: a part of `scale.py`.

docs/scale.md explains the terms. `measured` rows are those of `scale.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH = {"float32": 4, "bfloat16": 2}
AIM = {"float32": 33_000, "bfloat16": 40_000}
"""Bytes that a process may send in a step."""
MODELLED = [(1e7, 8), (1e8, 8), (1e9, 8), (1e10, 64), (1e11, 512)]
"""Weights and processes that the cost model is evaluated for."""
MEASURED = 1e8
"""Weights up to which steps are measured; above, seconds are extrapolated."""
LAYERS = 300
NEAR = 0.06
"""Most normally distributed weights that share the first digit of their magnitude."""
STEPS, PEAK = "steps_bytes_per_local_weight", "peak_bytes_per_local_weight"
COUNTED = (1e7, 1e8)
"""Sizes of which the predicted memory is compared with the measured one."""


def exchanged(weights: float, layers: int, *, ties: bool) -> dict[str, int]:
    """Return the bytes that a process sends in a step with one threshold, and the calls.

    Args:
        weights: number of weights.
        layers: number of weight tensors.
        ties: whether weights have the magnitude of the threshold.
    """
    counts = [2**11, 2**10, 2**10]  # digits of a float32
    if ties:  # digits of a position, of 11 bits
        bits = (int(weights) - 1).bit_length()
        counts += [2 ** min(11, bits - done) for done in range(0, bits, 11)]
    width = 4 if weights < 2**31 else 8
    # Flags of external writes, of 32 bits, and whether a weight is NaN, of 64 bits.
    return {"bytes": width * sum(counts) + 4 * layers + 8, "calls": len(counts) + 2}


def most_tensors(weights: float, dtype: str, *, ties: bool) -> int:
    """Return the most weight tensors with which a step sends no more than the aim; 0 for none."""
    return max(0, (AIM[dtype] - exchanged(weights, 0, ties=ties)["bytes"]) // 4)


def memory(weights: float, ranks: int, dtype: str) -> tuple[float, float]:
    """Return the bytes that each process keeps, and at most needs temporarily."""
    local = weights / ranks
    return WIDTH[dtype] * local, 8 * NEAR * local


def model(weights: float, ranks: int, dtype: str, ns: float | None) -> dict[str, Any]:
    """Return the cost for each process, derived from the code.

    Args:
        weights: number of weights.
        ranks: number of processes.
        dtype: name of the type of the weights.
        ns: measured CPU nanoseconds of a step per local weight, to extrapolate; None for none.
    """
    kept, temporary = memory(weights, ranks, dtype)
    kinds = {"without ties": False, "with ties": True}
    return {
        "weights": weights,
        "ranks": ranks,
        "dtype": dtype,
        "gib_kept": kept / 2**30,
        "gib_temporary": temporary / 2**30,
        "exchanged": {name: exchanged(weights, LAYERS, ties=ties) for name, ties in kinds.items()},
        "most_tensors": {name: most_tensors(weights, dtype, ties=t) for name, t in kinds.items()},
        "cpu_seconds_extrapolated": None
        if ns is None or weights <= MEASURED
        else ns * weights / ranks / 1e9,
    }


def baselines(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """Return estimates of what a process needs for any number of weights, where not recorded.

    By processes and type: the peak with the fewest weights, without their latent weights.
    """
    found = {}
    for row in sorted(rows, key=lambda row: row["size"], reverse=True):
        local = row["size"] / row["ranks"]
        kept, _ = memory(row["size"], row["ranks"], row["dtype"])
        found[row["ranks"], row["dtype"]] = row[PEAK] * local - kept
    return found


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the predicted and the measured peak memory of a process, in bytes."""
    estimates, found = baselines(rows), []
    for row in rows:
        if min(abs(row["size"] / size - 1) for size in COUNTED) > 0.01:
            continue
        kept, temporary = memory(row["size"], row["ranks"], row["dtype"])
        base = row.get("baseline_bytes", estimates[row["ranks"], row["dtype"]])
        found.append(
            {key: row[key] for key in ("size", "ranks", "dtype")}
            | {
                "baseline": base,
                "estimated": "baseline_bytes" not in row,
                "predicted": [base + kept, base + kept + temporary],
                "measured": row.get(STEPS, row[PEAK]) * row["size"] / row["ranks"],
                "peak": row[PEAK] * row["size"] / row["ranks"],
            }
        )
    return found


def memory_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines that compare the predicted and the measured memory."""
    lines = [
        "peak memory of a process without parameters, MB: predicted without and with temporary",
        "memory, and measured in steps; all: with the first selection, when the sparsity jumps",
        "baseline: of any number of weights (~: estimated, and measured with the first selection)",
        f"{'weights':>14} {'ranks':>5} {'type':>9} {'baseline':>9} {'predicted':>15}"
        f" {'measured':>8} {'/ pred.':>7} {'all':>6}",
    ]
    for row in compared(rows):
        low, high = row["predicted"]
        base = f"{'~' if row['estimated'] else ''}{row['baseline'] / 1e6:.1f}"
        lines.append(
            f"{row['size']:>14,} {row['ranks']:>5} {row['dtype']:>9} {base:>9}"
            f" {f'{low / 1e6:.1f} to {high / 1e6:.1f}':>15} {row['measured'] / 1e6:>8.1f}"
            f" {row['measured'] / high:>7.2f} {row['peak'] / 1e6:>6.1f}"
        )
    return lines


def model_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the cost model."""
    lines = [
        f"cost model per process; {LAYERS} layers; bytes and calls without ties, and with;",
        f"most tensors with which the aim of {AIM['float32']:,} (float32) or {AIM['bfloat16']:,}"
        " (bfloat16) bytes is kept;",
        "seconds of one CPU thread, extrapolated",
        f"{'weights':>15} {'ranks':>5} {'type':>8} {'GiB kept':>8} {'temp.':>6} {'bytes':>16}"
        f" {'calls':>5} {'tensors':>11} {'seconds':>7}",
    ]
    for row in rows:
        seconds = row["cpu_seconds_extrapolated"]
        without, ties = (row["exchanged"][name] for name in ("without ties", "with ties"))
        most = [row["most_tensors"][name] for name in ("without ties", "with ties")]
        lines.append(
            f"{int(row['weights']):>15,} {row['ranks']:>5} {row['dtype']:>8}"
            f" {row['gib_kept']:>8.3f} {row['gib_temporary']:>6.3f}"
            f" {without['bytes']:>8,} {ties['bytes']:>7,}"
            f" {without['calls']:>2} {ties['calls']:>2} {most[0]:>6,} {most[1]:>4,}"
            f" {'' if seconds is None else f'{seconds:.2f}':>7}"
        )
    return lines

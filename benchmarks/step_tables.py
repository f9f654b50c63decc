"""The printed report of `step_overhead.py`."""

from __future__ import annotations

from typing import Any


def header(record: dict[str, Any], enough: int) -> str:
    """Return hardware, versions, command and phase; below `enough` repetitions, also a warning."""
    hardware, settings = record["hardware"], record["settings"]
    where = (
        f"{hardware['cpu']}, {hardware['cores']} core(s), {hardware['threads']} thread(s), "
        f"{' '.join(hardware['simd'])}; PyTorch uses {hardware['simd_used']}"
    )
    if "gpu" in hardware:
        where = f"{hardware['gpu']}; {where}"
    lines = [
        where,
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        f"commit {record['commit'] or 'unknown'}, {record['date']}",
    ]
    if record["peer_commit"]:
        lines.append(f"official implementation at {record['peer_commit']}")
    phase = "at the final" if settings["at"] == "end" else "while rising to the final"
    lines += [
        record["command"],
        f"{settings['steps']} repetitions {phase} sparsity {settings['sparsity']:.2%}; "
        "methods without the option schedule: over their entire schedule",
    ]
    if settings["steps"] < enough:
        lines.append(f"(fewer than {enough} repetitions: a trial, not a measurement)")
    return "\n".join(lines)


def comparison_table(result: dict[str, Any]) -> str:
    """Return times and ratios of all contestants, and time and memory of the engine."""
    load = "" if result["load_before"] is None else f", load before {result['load_before']:.1f}"
    lines = [
        f"\n{result['network']}, batch {result['batch']}, {result['prunable']:,} prunable weights"
        f"{load}",
        f"  {'':<18} {'median ms':>10} {'quartiles':>17} {'/ dense':>8} {'95% CI':>15}"
        f" {'of means':>9} {'limit':>6}",
    ]
    for name, row in result["contestants"].items():
        low, high = row["quartiles_ms"]
        interval = f"{row['interval'][0]:.3f}-{row['interval'][1]:.3f}"
        limit = f"{row['limit']:.2f}" if row["limit"] else ""
        lines.append(
            f"  {name:<18} {row['median_ms']:>10.1f} {f'{low:.1f}-{high:.1f}':>17}"
            f" {row['ratio']:>8.3f} {interval:>15} {row['ratio_of_means']:>9.3f} {limit:>6}"
        )
    for name, row in result["engine"].items():
        calls = ", ".join(f"{key} {value:.2f}" for key, value in row["ms"].items())
        parts = ", ".join(
            f"{key.replace('_', ' ')} {value:.2f}" for key, value in row["parts_ms"].items()
        )
        copies = {key: value / row["memory"]["weights"] for key, value in row["memory"].items()}
        lines += [
            f"  engine of {name}, third quarter of the schedule: {row['sum_ms']:.2f} ms per step: "
            f"{calls}",
            f"    of which: {parts}",
            "    memory relative to the prunable weights: "
            f"{copies['latent'] + copies['method']:.2f} persistent ({copies['method']:.2f} by the "
            f"method), {copies['transient']:.2f} temporary",
        ]
    return "\n".join(lines)


def limits_table(results: list[dict[str, Any]]) -> str:
    """Return the measured ratios with their limits."""
    lines = [
        f"\n{'network':<14} {'batch':>5}  {'contestant':<16} {'/ dense':>8} {'limit':>6}"
        f" {'':<7} {'control':>8} {'official':>9} {'engine ms':>10}"
    ]
    for result in results:
        rows = result["contestants"]
        official = f"{rows['official']['ratio']:.3f}" if "official" in rows else ""
        for name, row in rows.items():
            if row["limit"] is not None:
                verdict = "within" if row["ratio"] <= row["limit"] else "OVER"
                lines.append(
                    f"{result['network']:<14} {result['batch']:>5}  {name:<16}"
                    f" {row['ratio']:>8.3f} {row['limit']:>6.2f} {verdict:<7}"
                    f" {rows['control']['ratio']:>8.3f} {official:>9}"
                    f" {result['engine'][name]['sum_ms']:>10.2f}"
                )
    return "\n".join(lines)

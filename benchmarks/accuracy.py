"""Test accuracy of methods x sparsities x seeds on one budget, as a table with its spread.

    python benchmarks/accuracy.py --data-path FOLDER --out runs/accuracy \
        --results results/cifar100-small

Runs are independent processes, `--jobs` at a time; one that is killed goes on where it was, and
one that is done is not trained again. With `--minutes` none starts after that time; the next
call goes on. The accuracy is that of the last epoch on the test images:
nothing is chosen. `--results` receives runs.json (a row per run, curves included), table.md and
curves.png, written anew after every run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing as mp
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def jobs_of(args: argparse.Namespace) -> list[tuple[str, float | None, int]]:
    """The runs, seeds outermost so that every method has its first seed early."""
    found = []
    for seed, sparsity, method in itertools.product(args.seeds, args.sparsity, args.methods):
        job = (method, None if method == "dense" else sparsity, seed)
        if job not in found:
            found.append(job)
    return found


def run(job: tuple[str, float | None, int], args: argparse.Namespace) -> Row | None:
    """Train one network, or read what it gave; None where there is no time to start."""
    from torch_feather.training import resolve_config, train
    from torch_feather.training.config import parse_assignments

    method, sparsity, seed = job
    overrides = {"method": method, "seed": seed, "data.path": args.data_path}
    if sparsity is not None:
        overrides["sparsity"] = sparsity
    overrides |= parse_assignments(args.set)
    config = resolve_config(args.recipe, None, overrides)
    name = f"{method}-{sparsity}-{seed}" if sparsity is not None else f"{method}-{seed}"
    folder = Path(args.out) / name
    if time.time() > args.deadline and not (folder / "report.json").exists():
        return None
    results = train(config, folder, resume=folder.exists())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return {
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "epochs": results["epochs"],
        "test_accuracy": results["test_accuracy"],
        "train_loss": results["train_loss"],
        "weights": results["report"]["weights"],
        "zeros": results["report"]["zeros"],
        "macs": results["macs"]["sparse"],
        "seconds": round(results["seconds"], 1),
        "curve": {key: [m[key] for m in metrics] for key in ("epoch", "train_loss", "sparsity")},
        "commit": results["commit"],
        "versions": results["versions"],
        "hardware": results["hardware"],
    }


def table(rows: list[Row], command: str) -> str:
    """Mean and standard deviation of test accuracy, as Markdown."""
    groups: dict[tuple[str, float | None], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["sparsity"]].append(row)
    lines = [
        "| method | sparsity | test accuracy, % | n | zeros / weights | multiply-adds, M |",
        "|---|---|---|---|---|---|",
    ]
    for (method, sparsity), group in sorted(groups.items(), key=_order):
        accuracies = [100 * row["test_accuracy"] for row in group]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(group) > 1 else ""
        zeros = sorted({row["zeros"] for row in group})
        macs = statistics.mean(row["macs"] for row in group) / 1e6
        lines.append(
            f"| {method} | {'' if sparsity is None else f'{100 * sparsity:g} %'} "
            f"| {statistics.mean(accuracies):.2f}{spread} | {len(group)} "
            f"| {' or '.join(f'{z:,}' for z in zeros)} / {group[0]['weights']:,} | {macs:.2f} |"
        )
    first = rows[0]
    machines = sorted({f"{r['hardware']['cpu']}, {r['hardware']['threads']} thread" for r in rows})
    versions = sorted({f"PyTorch {r['versions']['torch']}" for r in rows})
    commits = sorted({str(r["commit"])[:10] for r in rows})
    return "\n".join(
        [
            *lines,
            "",
            f"Mean ± standard deviation over seeds {sorted({r['seed'] for r in rows})}; last epoch "
            f"of {first['epochs']}, nothing chosen. {'; '.join(machines)}; {', '.join(versions)}; "
            f"commit {', '.join(commits)}.",
            "",
            f"    {command}",
            "",
        ]
    )


def _order(item: tuple[tuple[str, float | None], list[Row]]) -> tuple[float, float]:
    (_, sparsity), group = item
    return sparsity or 0.0, -statistics.mean(row["test_accuracy"] for row in group)


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy over sparsity, one point per seed; training loss over epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    methods = sorted({row["method"] for row in rows})
    for i, method in enumerate(methods):
        colour = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"][i % 6]
        mine = [row for row in rows if row["method"] == method]
        sparsities = sorted({row["sparsity"] for row in mine if row["sparsity"] is not None})
        if not sparsities:
            mean = statistics.mean(100 * row["test_accuracy"] for row in mine)
            left.axhline(mean, color=colour, linestyle="--", label=method)
        for sparsity in sparsities:
            accuracies = [100 * r["test_accuracy"] for r in mine if r["sparsity"] == sparsity]
            x = sparsities.index(sparsity) + 0.08 * (i - (len(methods) - 1) / 2)
            left.plot([x] * len(accuracies), accuracies, "o", color=colour, alpha=0.5, mew=0)
            label = method if sparsity == sparsities[0] else None
            left.plot(x, statistics.mean(accuracies), "_", color=colour, ms=18, mew=2, label=label)
            left.set_xlim(-0.5, len(sparsities) - 0.5)
            left.set_xticks(range(len(sparsities)), [f"{100 * s:g} %" for s in sparsities])
        highest = max(sparsities, default=None)
        curves = [r["curve"] for r in mine if r["sparsity"] == highest]
        losses = [
            statistics.mean(values)
            for values in zip(*(c["train_loss"] for c in curves), strict=True)
        ]
        title = method if highest is None else f"{method}, {100 * highest:g} %"
        right.plot(curves[0]["epoch"], losses, color=colour, label=title)
    left.set(xlabel="sparsity", ylabel="test accuracy, %", title="Each seed, and the mean")
    right.set(xlabel="epoch", ylabel="training loss", title="Mean over seeds")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="cifar100-small")
    parser.add_argument("--data-path", required=True)
    parser.add_argument(
        "--methods", nargs="+", default=["dense", "feather", "hard-ste", "soft-ste"]
    )
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.95, 0.98])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], help="settings, such as system.amp=true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start none after that")
    parser.add_argument("--out", default="runs/accuracy", help="run directories")
    parser.add_argument("--results", type=Path, required=True, help="table, plot and rows")
    args = parser.parse_args()

    command = (
        f"python benchmarks/accuracy.py --recipe {args.recipe} --methods {' '.join(args.methods)} "
        f"--sparsity {' '.join(map(str, args.sparsity))} --seeds {' '.join(map(str, args.seeds))}"
        + (f" --set {' '.join(args.set)}" if args.set else "")
    )
    args.results.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    args.deadline = time.time() + 60 * args.minutes
    with ProcessPoolExecutor(args.jobs, mp.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, job, args) for job in jobs_of(args)]):
            if (row := future.result()) is None:
                continue
            rows.append(row)
            rows.sort(key=lambda r: (r["sparsity"] or 0, r["method"], r["seed"]))
            text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
            (args.results / "runs.json").write_text(text)
            (args.results / "table.md").write_text(table(rows, command))
            plot(rows, args.results / "curves.png")
            print(table(rows, command), flush=True)


if __name__ == "__main__":
    main()

"""Test accuracy of this implementation beside the official one, on the same runs.

    python benchmarks/peer_accuracy.py --peer ../feather --data-path FOLDER \
        --seeds 0 1 2 --sparsity .95 .98 --out results/peer_accuracy

Both are trained by `torch_feather.training`: the same network with the same initial weights, the
same images in the same order with the same augmentation, one optimizer, one thread. Only what
makes the network sparse differs. `--out` receives a JSON file per run, written when the run is
done and not trained again, then table.md and summary.json. The accuracy is that of the last epoch
on the test images: nothing is chosen.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import official
import torch

from torch_feather.studies.spread import interval
from torch_feather.training import Config, resolve_config, train
from torch_feather.training.checkpoint import RunDirectory, write_json
from torch_feather.training.config import parse_assignments, to_dict
from torch_feather.training.data import Batch, Dataset, load_dataset
from torch_feather.training.distributed import Ranks
from torch_feather.training.task import Task

Row = dict[str, Any]
OURS, OFFICIAL = "ours", "official"


class OfficialTask(Task):
    """The trainer's task with the official implementation in place of a sparsifier.

    It is called as its README says: `update_thresh()` before each step and, with
    `end_of_batch=True`, after the last one of an epoch; `desparsify()` at the end.
    """

    model: torch.nn.Module

    def __init__(
        self,
        implementation: ModuleType,
        config: Config,
        data: Dataset,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        super().__init__(config.dense(), data, device, ranks)
        self.config = config
        self.pruner = official.wrap(
            implementation,
            self.model,
            device,
            sparsity=config.sparsity,
            steps_per_epoch=len(self.loader),
            epochs=config.epochs,
        )
        run = self.train_step.run

        def with_threshold(batch: Batch) -> None:
            self.pruner.update_thresh()
            run(batch)

        self.train_step.run = with_threshold  # type: ignore[method-assign]

    def end_epoch(self, images: int, began: float) -> None:
        """Measures a copy made sparse: the wrapped model holds dense weights."""
        self.pruner.update_thresh(end_of_batch=True)
        wrapped = self.model
        sparse = copy.deepcopy(self.pruner)
        sparse.desparsify()
        self.model = sparse.model
        try:
            super().end_epoch(images, began)
        finally:
            self.model = wrapped

    def finish(self, run: RunDirectory) -> Row:
        """Unwraps, then measures a plain model."""
        self.pruner.desparsify()
        return super().finish(run)


def configuration(arguments: argparse.Namespace, sparsity: float, seed: int) -> Config:
    """What both implementations train with."""
    overrides = {
        "data.name": arguments.data,
        "data.path": arguments.data_path,
        "method": "feather",
        "sparsity": sparsity,
        "seed": seed,
        "compare_dense": False,
        "select": "last",
        "system.threads": 1,
        "system.checkpoint_seconds": 1e9,
    }
    if arguments.epochs is not None:
        overrides["epochs"] = arguments.epochs
    return resolve_config(arguments.recipe, None, overrides | parse_assignments(arguments.set))


def settings(config: Config) -> dict[str, Any]:
    """What decides a run, without where its files are."""
    values = to_dict(config)
    del values["data"]["path"]
    return values


def run(implementation: str, config: Config, peer: Path) -> Row:
    """Train one network; what its JSON file holds."""
    with tempfile.TemporaryDirectory() as folder:
        task: Callable[..., Task] = Task
        if implementation == OFFICIAL:
            task = partial(OfficialTask, official.load_official(peer))
        results = train(config, folder, make_task=task)
        metrics = RunDirectory(folder).read_metrics()
    report = results["report"]
    return {
        "implementation": implementation,
        "sparsity": config.sparsity,
        "seed": config.seed,
        "test_accuracy": results["test_accuracy"],
        "test_loss": results["test_loss"],
        "train_loss": results["train_loss"],
        "weights": report["weights"],
        "zeros": report["zeros"],
        "macs": results["macs"]["sparse"],
        "seconds": round(results["seconds"], 1),
        "curve": {
            key: [line[key] for line in metrics] for key in ("epoch", "train_loss", "sparsity")
        },
        "peer_commit": official.commit(peer) if implementation == OFFICIAL else None,
        "settings": settings(config),
        **{key: results[key] for key in ("commit", "versions", "hardware")},
    }


def file_of(out: Path, implementation: str, config: Config) -> Path:
    return out / f"{implementation}-{100 * config.sparsity:g}-seed{config.seed}.json"


def read(path: Path, config: Config) -> Row:
    """A finished run. SystemExit where it was trained with other settings."""
    row = json.loads(path.read_text())
    if row["settings"] != json.loads(json.dumps(settings(config))):
        raise SystemExit(f"{path}: trained with other settings; choose another --out, or delete it")
    return row


def aggregate(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per sparsity: means and deviations in %, over the seeds that both have, and how they differ.

    `interval` is Student's 95 % interval of the difference, seed by seed: a seed gives both the
    same weights and batches. None with one seed.
    """
    accuracy = {
        (r["sparsity"], r["seed"], r["implementation"]): 100 * r["test_accuracy"] for r in rows
    }
    result = []
    for sparsity in sorted({r["sparsity"] for r in rows}):
        of_this = [r for r in rows if r["sparsity"] == sparsity]
        seeds = sorted(
            {r["seed"] for r in of_this if r["implementation"] == OURS}
            & {r["seed"] for r in of_this if r["implementation"] == OFFICIAL}
        )
        if not seeds:
            continue
        values = {
            who: [accuracy[sparsity, seed, who] for seed in seeds] for who in (OURS, OFFICIAL)
        }
        entry: dict[str, Any] = {"sparsity": sparsity, "seeds": seeds, "n": len(seeds)}
        for who, found in values.items():
            zeros = {r["zeros"] for r in of_this if r["implementation"] == who}
            entry[who] = {
                "mean": statistics.mean(found),
                "deviation": statistics.stdev(found) if len(found) > 1 else None,
                "zeros": sorted(zeros),
            }
        entry["weights"] = of_this[0]["weights"]
        entry["difference"] = entry[OURS]["mean"] - entry[OFFICIAL]["mean"]
        ahead = [a - b for a, b in zip(values[OURS], values[OFFICIAL], strict=True)]
        entry["interval"] = list(interval(ahead)) if len(ahead) > 1 else None
        result.append(entry)
    return result


def table(rows: Sequence[Row], command: str) -> str:
    """The summary and every seed, as Markdown."""
    lines = [
        "| sparsity | ours, % | official, % | difference (95 % interval) | n "
        "| zeros, ours | zeros, official | of |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in aggregate(rows):
        between = entry["interval"]
        spread = f" ({between[0]:+.2f} to {between[1]:+.2f})" if between else ""
        lines.append(
            f"| {100 * entry['sparsity']:g} % | {_mean(entry[OURS])} | {_mean(entry[OFFICIAL])} "
            f"| {entry['difference']:+.2f}{spread} | {entry['n']} | {_zeros(entry[OURS])} "
            f"| {_zeros(entry[OFFICIAL])} | {entry['weights']:,} |"
        )
    lines += [
        "",
        "| sparsity | seed | ours, % | official, % | difference | training loss, ours | official |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {(r["sparsity"], r["seed"], r["implementation"]): r for r in rows}
    for sparsity, seed in sorted({(r["sparsity"], r["seed"]) for r in rows}):
        pair = [found.get((sparsity, seed, who)) for who in (OURS, OFFICIAL)]
        accuracies = [100 * row["test_accuracy"] if row else math.nan for row in pair]
        columns = [f"{value:.2f}" for value in accuracies]
        columns.append(f"{accuracies[0] - accuracies[1]:+.2f}")
        columns += [f"{row['train_loss']:.4f}" if row else "nan" for row in pair]
        lines.append(
            f"| {100 * sparsity:g} % | {seed} | "
            + " | ".join("" if value in ("nan", "+nan") else value for value in columns)
            + " |"
        )
    return "\n".join([*lines, "", *_provenance(rows), "", f"    {command}", ""])


def _mean(entry: dict[str, Any]) -> str:
    deviation = entry["deviation"]
    return f"{entry['mean']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _zeros(entry: dict[str, Any]) -> str:
    return " or ".join(f"{count:,}" for count in entry["zeros"])


def _provenance(rows: Sequence[Row]) -> list[str]:
    machines = {f"{r['hardware']['cpu']}, {r['hardware']['threads']} thread" for r in rows}
    peers = {_short(r["peer_commit"]) for r in rows if r["implementation"] == OFFICIAL}
    first = rows[0]["settings"]
    return [
        f"{first['network']} on {first['data']['name']}, recipe {first['recipe']}, "
        f"{first['epochs']} epochs. Mean ± standard deviation over seeds of the test accuracy of "
        "the last epoch; nothing chosen. The interval is Student's, of differences seed by seed.",
        "",
        f"{'; '.join(sorted(machines))}; "
        f"PyTorch {', '.join(sorted({r['versions']['torch'] for r in rows}))}; "
        f"commit {', '.join(sorted({_short(r['commit']) for r in rows}))}; "
        f"official implementation at {', '.join(sorted(peers)) or 'none yet'}.",
    ]


def _short(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:10] + ("+" if commit.endswith("+") else "")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of the official one")
    parser.add_argument("--recipe", default="cifar100-small")
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--data-path")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--epochs", type=int, help="[the recipe's]")
    parser.add_argument("--set", nargs="+", default=[], help="settings, such as network=resnet20")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("results/peer_accuracy"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    official.load_official(arguments.peer)
    names = {str(arguments.peer): "OFFICIAL"}
    if arguments.data_path:
        names[arguments.data_path] = "DATA"
    command = official.recorded_command(argv, names)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that train
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    pending = []
    # Seeds outermost, so that every sparsity has its first pair early.
    for seed, sparsity in itertools.product(arguments.seeds, arguments.sparsity):
        config = configuration(arguments, sparsity, seed)
        for who in (OURS, OFFICIAL):
            path = file_of(arguments.out, who, config)
            if path.exists():
                rows.append(read(path, config))
            else:
                pending.append((who, config, path))
    print(f"{len(rows)} run(s) done before, {len(pending)} to do", flush=True)
    if pending:
        load_dataset(pending[0][1].data, 0)  # decoded once, not by every process
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, max_tasks_per_child=1) as pool:
        paths = {
            pool.submit(run, who, config, arguments.peer): path for who, config, path in pending
        }
        try:
            for future in as_completed(paths):
                row = future.result()
                write_json(paths[future], row)
                rows.append(row)
                print(
                    f"{paths[future].stem}: test accuracy {row['test_accuracy']:.2%}, "
                    f"{row['zeros']:,} zeros, {row['seconds']:.0f} s",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    text = table(rows, command)
    (arguments.out / "table.md").write_text(text)
    write_json(arguments.out / "summary.json", aggregate(rows))
    print("\n" + text)


if __name__ == "__main__":
    main()

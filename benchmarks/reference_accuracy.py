"""Test accuracy of torch-feather and of the official implementation, on the same runs.

    python benchmarks/reference_accuracy.py --reference ../feather --data-path FOLDER \
        --seeds 0 1 2 --sparsity .95 .98 --out results/reference_accuracy

Both are trained by `torch_feather.training` with the same network, initial weights, images, order
of images, augmentation, optimizer and one thread. Only the sparse training method differs. `--out`
receives a JSON file for each completed run, table.md and summary.json; completed runs are not
repeated. The accuracy is the test accuracy after the last epoch.
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
from renamed_options import current_options

from torch_feather.studies.comparison import interval
from torch_feather.studies.summary import signed
from torch_feather.training import Config, resolve_config, train
from torch_feather.training.checkpoint import RunDirectory, write_json
from torch_feather.training.config import parse_assignments, to_dict
from torch_feather.training.data import Batch, Dataset, load_dataset
from torch_feather.training.distributed import Ranks
from torch_feather.training.task import Task

Row = dict[str, Any]
FEATHER, OFFICIAL = "ours", "official"  # names in the recorded files


class OfficialTask(Task):
    """The trainer's task with the official implementation instead of a sparsifier.

    The calls follow its README: `update_thresh()` before each step and, with `end_of_batch=True`,
    after the last step of an epoch; `desparsify()` at the end.
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

    def end_epoch(
        self, images: int, began: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        """Measure a sparse copy, because the wrapped model holds dense weights."""
        self.pruner.update_thresh(end_of_batch=True)
        wrapped = self.model
        sparse = copy.deepcopy(self.pruner)
        sparse.desparsify()
        self.model = sparse.model
        try:
            super().end_epoch(images, began, stop_requested)
        finally:
            self.model = wrapped

    def finish(self, run: RunDirectory) -> Row:
        """Unwrap the model, then measure it."""
        self.pruner.desparsify()
        return super().finish(run)


def configuration(arguments: argparse.Namespace, sparsity: float, seed: int) -> Config:
    """Return the configuration of both implementations."""
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
    """Return the settings that determine a run, without paths."""
    values = to_dict(config)
    del values["data"]["path"]
    return values


def run(implementation: str, config: Config, reference: Path) -> Row:
    """Train one network; return the content of its JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        task: Callable[..., Task] = Task
        if implementation == OFFICIAL:
            task = partial(OfficialTask, official.load_official(reference))
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
        "peer_commit": official.commit(reference) if implementation == OFFICIAL else None,
        "settings": settings(config),
        **{key: results[key] for key in ("commit", "versions", "hardware")},
    }


def file_of(out: Path, implementation: str, config: Config) -> Path:
    return out / f"{implementation}-{100 * config.sparsity:g}-seed{config.seed}.json"


def read(path: Path, config: Config) -> Row:
    """Read a completed run.

    Raises:
        SystemExit: it was trained with other settings.
    """
    row = json.loads(path.read_text())
    if row["settings"] != json.loads(json.dumps(settings(config))):
        raise SystemExit(f"{path}: trained with other settings. Choose another --out or delete it.")
    return row


def aggregate(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return means, standard deviations and differences in % for each sparsity.

    Only seeds of both implementations count. `interval` is the 95% t interval of the paired
    differences, None with one seed: a seed gives both the same initial weights and batches.
    """
    accuracy = {
        (r["sparsity"], r["seed"], r["implementation"]): 100 * r["test_accuracy"] for r in rows
    }
    result = []
    for sparsity in sorted({r["sparsity"] for r in rows}):
        of_this = [r for r in rows if r["sparsity"] == sparsity]
        seeds = sorted(
            {r["seed"] for r in of_this if r["implementation"] == FEATHER}
            & {r["seed"] for r in of_this if r["implementation"] == OFFICIAL}
        )
        if not seeds:
            continue
        values = {
            who: [accuracy[sparsity, seed, who] for seed in seeds] for who in (FEATHER, OFFICIAL)
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
        entry["difference"] = entry[FEATHER]["mean"] - entry[OFFICIAL]["mean"]
        paired = [a - b for a, b in zip(values[FEATHER], values[OFFICIAL], strict=True)]
        entry["interval"] = list(interval(paired)) if len(paired) > 1 else None
        result.append(entry)
    return result


def table(rows: Sequence[Row], command: str) -> str:
    """Return the summary and all seeds as Markdown."""
    lines = [
        "| sparsity | torch-feather (%) | official (%) | difference (95% CI) | n "
        "| zeros, torch-feather | zeros, official | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in aggregate(rows):
        between = entry["interval"]
        spread = f" ({signed(between[0])} to {signed(between[1])})" if between else ""
        lines.append(
            f"| {100 * entry['sparsity']:g}% | {_mean(entry[FEATHER])} | {_mean(entry[OFFICIAL])} "
            f"| {signed(entry['difference'])}{spread} | {entry['n']} | {_zeros(entry[FEATHER])} "
            f"| {_zeros(entry[OFFICIAL])} | {entry['weights']:,} |"
        )
    lines += [
        "",
        "| sparsity | seed | torch-feather (%) | official (%) | difference "
        "| training loss, torch-feather | training loss, official |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {(r["sparsity"], r["seed"], r["implementation"]): r for r in rows}
    for sparsity, seed in sorted({(r["sparsity"], r["seed"]) for r in rows}):
        pair = [found.get((sparsity, seed, who)) for who in (FEATHER, OFFICIAL)]
        accuracies = [100 * row["test_accuracy"] if row else math.nan for row in pair]
        columns = [f"{value:.2f}" for value in accuracies]
        columns.append(signed(accuracies[0] - accuracies[1]))
        columns += [f"{row['train_loss']:.4f}" if row else "nan" for row in pair]
        lines.append(
            f"| {100 * sparsity:g}% | {seed} | "
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
    references = {_short(r["peer_commit"]) for r in rows if r["implementation"] == OFFICIAL}
    first = rows[0]["settings"]
    return [
        f"{first['network']} on {first['data']['name']}, recipe {first['recipe']}, "
        f"{first['epochs']} epochs. Test accuracy after the last epoch: mean ± standard deviation "
        "over seeds. CI: t interval of the paired differences.",
        "",
        f"{'; '.join(sorted(machines))}; "
        f"PyTorch {', '.join(sorted({r['versions']['torch'] for r in rows}))}; "
        f"commit {', '.join(sorted({_short(r['commit']) for r in rows}))}; "
        f"official implementation at {', '.join(sorted(references)) or 'unknown'}.",
    ]


def _short(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:10] + ("+" if commit.endswith("+") else "")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, help=official.REFERENCE_HELP)
    parser.add_argument("--recipe", default="cifar100-small")
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--data-path")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--epochs", type=int, help="default: those of the recipe")
    parser.add_argument("--set", nargs="+", default=[], help="settings, such as network=resnet20")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs")
    parser.add_argument("--out", type=Path, default=Path("results/reference_accuracy"))
    return parser.parse_args(current_options(argv, official.RENAMED))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    official.load_official(arguments.reference)
    names = {str(arguments.reference): "OFFICIAL"}
    if arguments.data_path:
        names[arguments.data_path] = "DATA"
    command = official.recorded_command(argv, names)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the training processes
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    pending = []
    # Seeds outermost, so that every sparsity has its first pair early.
    for seed, sparsity in itertools.product(arguments.seeds, arguments.sparsity):
        config = configuration(arguments, sparsity, seed)
        for who in (FEATHER, OFFICIAL):
            path = file_of(arguments.out, who, config)
            if path.exists():
                rows.append(read(path, config))
            else:
                pending.append((who, config, path))
    print(f"{len(rows)} completed runs found, {len(pending)} to train", flush=True)
    if pending:
        load_dataset(pending[0][1].data, 0)  # decode once, not in every process
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, max_tasks_per_child=1) as pool:
        paths = {
            pool.submit(run, who, config, arguments.reference): path
            for who, config, path in pending
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

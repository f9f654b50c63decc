"""Training speed from stored images to updated weights, relative to a plain PyTorch loop.

`plain` is the loop of PyTorch's tutorials on the same images: a DataLoader with worker processes,
torchvision's transforms and the dense network. `official` is the same loop with the official
implementation of Feather. All others are the trainer of torch-feather, dense and sparse, with the
given switches. In each repetition, all contestants train for some steps in random order. Numbers
are medians over repetitions; ratios are formed within a repetition. `--jobs` measures how many
independent runs should share the device, by training that many concurrently.

    python benchmarks/train_speed.py --data-path FOLDER --switches none compile amp compile+amp
    python benchmarks/train_speed.py --data-path FOLDER --device cuda --switches none \
        compile+graph amp+compile+graph --steps 100 --reference ../feather \
        --json results/speed.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import official
import torch
import torch.nn.functional as F
from renamed_options import current_options
from torch import nn

from torch_feather import models
from torch_feather.training import resolve_config
from torch_feather.training.config import Config, parse_assignments
from torch_feather.training.data import Batch, Dataset, load_dataset
from torch_feather.training.distributed import Ranks
from torch_feather.training.loop import settings
from torch_feather.training.provenance import provenance
from torch_feather.training.task import Task, make_optimizer

SWITCHES = ("compile", "amp", "graph")
WARM_UP = 1  # repetitions that are not measured: compilation, memory allocation


class Trainer:
    """The trainer of torch-feather."""

    def __init__(self, config: Config, data: Dataset, device: torch.device) -> None:
        self.task = Task(config, data, device, Ranks())
        self.task.model.train()
        self.batches = self._endless()

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self.task.loader

    def train(self, steps: int) -> int:
        """Take steps with the settings of a run; return the number of images."""
        images = 0
        with settings(self.task.config.system, self.task.ranks):
            for batch in itertools.islice(self.batches, steps):
                self.task.train_step(batch, self.task.learning_rate(self.task.step))
                self.task.step += 1
                images += batch.total
        return images

    def load(self, steps: int) -> int:
        """Load the batches of some steps without training; return the number of images."""
        return sum(batch.total for batch in itertools.islice(self.batches, steps))

    def evaluate(self, batches: int) -> int:
        """Evaluate the first batches of the test images; return the number of images."""
        chosen = list(itertools.islice(self.task.watched_images, batches))
        self.task.evaluate(chosen)
        return sum(len(y) for _, y in chosen)


class PlainLoop:
    """A DataLoader and training steps as in PyTorch's documentation."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        device: torch.device,
        workers: int,
        reference: ModuleType | None = None,
    ) -> None:
        from PIL import Image
        from torchvision import transforms

        size = data.train.pixels.shape[1]
        transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=config.data.shift),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

        class Images(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(data.train)

            def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
                image = Image.fromarray(data.train.pixels[i].squeeze(-1).numpy())
                return transform(image), int(data.train.labels[i])

        self.loader = torch.utils.data.DataLoader(
            Images(),
            config.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        torch.manual_seed(config.seed)
        self.model = models.create(config.network, data.classes, data.channels).to(device)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.before_step: Callable[[], object] = lambda: None
        if reference is not None:
            pruner = official.wrap(
                reference,
                self.model,
                device,
                sparsity=config.sparsity,
                steps_per_epoch=len(self.loader),
                epochs=config.epochs,
            )
            self.before_step = pruner.update_thresh
        self.device, self.clip = device, config.optimizer.clip
        self.batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def train(self, steps: int) -> int:
        """Take steps; return the number of images."""
        images = 0
        for x, y in itertools.islice(self.batches, steps):
            x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
            self.before_step()
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            images += len(y)
        return images


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of a call, including its work on the device, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def contestants(arguments: argparse.Namespace, config: Config, data: Dataset) -> dict[str, Any]:
    """Create all contestants by name, the plain loop first."""
    device = torch.device(arguments.device)
    found: dict[str, Any] = {"plain": PlainLoop(config, data, device, arguments.workers)}
    if arguments.reference:
        reference = official.load_official(Path(arguments.reference))
        found["official"] = PlainLoop(config, data, device, arguments.workers, reference)
    for switches in arguments.switches:
        on = [] if switches == "none" else switches.split("+")
        if unknown := set(on) - set(SWITCHES):
            raise SystemExit(
                f"--switches {switches}: unknown {', '.join(sorted(unknown))}. "
                f"Choose from {', '.join(SWITCHES)}."
            )
        system = replace(config.system, **dict.fromkeys(on, True))
        for method in arguments.methods:
            one = replace(config.dense() if method == "dense" else config, system=system)
            if method != "dense":
                one = replace(one, method=method)
            found[" +".join([method, *on])] = Trainer(one, data, device)
    return found


def measure(arguments: argparse.Namespace, config: Config, data: Dataset) -> list[dict[str, Any]]:
    """Measure all contestants; return a row for each."""
    device = torch.device(arguments.device)
    found = contestants(arguments, config, data)
    speeds: dict[str, list[float]] = {name: [] for name in found}
    loading: dict[str, list[float]] = {name: [] for name in found}
    order = random.Random(0)
    for number in range(WARM_UP + arguments.repetitions):
        for name in order.sample(list(found), len(found)):
            one = found[name]
            time.sleep(arguments.pause)  # worker processes fill their queues
            taken, images = seconds(lambda one=one: one.train(arguments.steps), device)
            if number < WARM_UP:
                continue
            speeds[name].append(images / taken)
            if isinstance(one, Trainer):
                alone, loaded = seconds(lambda one=one: one.load(arguments.steps), device)
                loading[name].append((alone / loaded) / (taken / images))
        if number >= WARM_UP:
            print(f"repetition {number - WARM_UP + 1} of {arguments.repetitions}", flush=True)
    rows = []
    for name, one in found.items():
        ratios = [a / b for a, b in zip(speeds[name], speeds["plain"], strict=True)]
        dense = name.replace(name.split(" ")[0], "dense", 1)
        row = {
            "name": name,
            "images_per_s": statistics.median(speeds[name]),
            "seconds_per_epoch": len(data.train) / statistics.median(speeds[name]),
            "times_plain": statistics.median(ratios),
            "times_plain_range": [min(ratios), max(ratios)],
        }
        if isinstance(one, Trainer):
            row["feeding"] = statistics.median(loading[name])
            taken, images = seconds(lambda one=one: one.evaluate(4), device)
            row["evaluated_per_s"] = images / taken
            pairs = zip(speeds[dense], speeds[name], strict=True) if dense in speeds else ()
            slower = [a / b for a, b in pairs]
            row["step_over_dense"] = statistics.median(slower) if slower else None
        rows.append(row)
    return rows


def _train_one(
    start: Any, ends: Any, arguments: argparse.Namespace, config: Config, seed: int
) -> None:
    """Train in one process of `concurrently`, from the common start to its own end."""
    torch.set_num_threads(1)
    config = replace(config, seed=seed)
    one = Trainer(config, load_dataset(config.data, config.seed), torch.device(arguments.device))
    one.train(arguments.steps)
    start.wait()
    taken, images = seconds(
        lambda: one.train(arguments.repetitions * arguments.steps), one.task.device
    )
    ends.put((taken, images))


def concurrently(arguments: argparse.Namespace, config: Config, jobs: int) -> dict[str, Any]:
    """Return the images per second of `jobs` concurrent sparse runs in total."""
    context = multiprocessing.get_context("spawn")
    start, ends = context.Barrier(jobs), context.Queue()
    on = dict.fromkeys((arguments.switches[-1].replace("none", "")).split("+"), True)
    on.pop("", None)
    config = replace(config, system=replace(config.system, **on))
    processes = [
        context.Process(target=_train_one, args=(start, ends, arguments, config, seed))
        for seed in range(jobs)
    ]
    for process in processes:
        process.start()
    results = [ends.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return {
        "jobs": jobs,
        "switches": arguments.switches[-1],
        "images_per_s": sum(images for _, images in results) / max(t for t, _ in results),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of all contestants."""
    lines = [
        f"{'':28} {'images/s':>9} {'s/epoch':>8} {'x plain':>8} {'(range)':>13} "
        f"{'step/dense':>10} {'loading':>8} {'evaluated/s':>11}"
    ]
    for row in rows:
        low, high = row["times_plain_range"]
        line = (
            f"{row['name']:28} {row['images_per_s']:9.0f} {row['seconds_per_epoch']:8.2f} "
            f"{row['times_plain']:8.3f} {f'{low:.2f} - {high:.2f}':>13}"
        )
        if "feeding" in row:
            ratio = row["step_over_dense"]
            line += f" {f'{ratio:.3f}' if ratio else '':>10} {row['feeding']:8.2%}"
            line += f" {row['evaluated_per_s']:11.0f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="cifar100")
    parser.add_argument("--data-path")
    parser.add_argument("--set", nargs="+", default=[], help="settings, such as network=resnet8")
    parser.add_argument("--methods", nargs="+", default=["dense", "feather"])
    parser.add_argument(
        "--switches", nargs="+", default=["none"], help="combinations, such as compile+amp"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the plain loop")
    parser.add_argument(
        "--steps", type=int, default=8, help="steps of a contestant in a repetition"
    )
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between contestants")
    parser.add_argument(
        "--jobs", nargs="*", type=int, default=[], help="concurrent runs, such as 1 2 4"
    )
    parser.add_argument("--reference", help=official.REFERENCE_HELP)
    parser.add_argument("--json", type=Path)
    renamed = official.RENAMED | {"--rounds": "--repetitions"}
    arguments = parser.parse_args(current_options(None, renamed))

    overrides = {"data.path": arguments.data_path} | parse_assignments(arguments.set)
    config = resolve_config(arguments.recipe, None, overrides)
    config = replace(config, compare_dense=False)
    data = load_dataset(config.data, config.seed)
    torch.set_num_threads(config.system.threads or torch.get_num_threads())
    facts = provenance(torch.device(arguments.device))
    names = {str(arguments.data_path): "FOLDER", str(arguments.reference): "OFFICIAL"}
    record: dict[str, Any] = {
        "command": official.recorded_command(None, names),
        "network": config.network,
        "rows": measure(arguments, config, data),
        **facts,
        "together": [],
        "steps": arguments.steps,
        "rounds": arguments.repetitions,
    }

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")

    save()
    print(table(record["rows"]), flush=True)
    for jobs in arguments.jobs:
        row = concurrently(arguments, config, jobs)
        record["together"].append(row)
        save()
        speed = f"{row['images_per_s']:9.0f} images/s"
        print(f"{row['jobs']:3} concurrent ({row['switches']}): {speed}", flush=True)
    print(f"\n{facts['hardware']}, PyTorch {facts['versions']['torch']}")


if __name__ == "__main__":
    main()

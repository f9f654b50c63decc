"""Terminal output of `feather`: progress bars and result tables."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ..deprecation import renamed_names
from ..measure.report import EMPTY_MARK, LayerReport, Report
from ..measure.report import percent as percent_of
from .average_precision import MEAN_AVERAGE_PRECISION, measure_name
from .callbacks import Callback
from .checkpoint import RunDirectory
from .config import Config
from .terminal import control_characters_shown

__getattr__ = renamed_names(__name__, {"ConsoleWatch": "ConsoleCallback"})

# Keys of report.json in version 0.1, by their present names.
OLD_KEYS = {"learned_sparsity": "own_sparsity"}


class Pace:
    """The recent training speed of this process. Time between epochs does not count.

    Args:
        clock: returns the time in seconds.

    Example:
        >>> times = iter([0.0, 1.0, 2.0])  # seconds
        >>> pace = Pace(lambda: next(times))
        >>> pace.step(images=128), pace.step(images=128)
        (True, True)
        >>> pace.rates()  # steps and images per second
        (1.0, 128.0)
        >>> pace.seconds_left(steps=10)
        10.0
    """

    WINDOW = 30.0  # seconds of training that the rates cover
    EVERY = 0.1  # seconds between two samples

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.trained = 0.0  # seconds of training in completed epochs
        self.between = 0.0  # seconds between completed epochs and the next ones, as for evaluation
        self.epochs = self.steps = self.images = 0
        self.epoch_images = 0  # images of the present epoch
        self.samples = deque([(0.0, 0, 0)])  # seconds, steps, images
        self.epoch_began = clock()

    def step(self, images: int) -> bool:
        """Count a step, and return whether the display is due for an update."""
        self.steps += 1
        self.images += images
        self.epoch_images += images
        seconds = self.trained + self.clock() - self.epoch_began
        if seconds - self.samples[-1][0] < self.EVERY:
            return False
        self._sample(seconds)
        return True

    def end_epoch(self, images_per_s: float) -> None:
        """Correct the duration of the epoch by its measured rate.

        The rate is measured after the device has finished. `step` is called when a step enters the
        device's queue, which can be much earlier.
        """
        seconds = self.epoch_images / images_per_s if self.epoch_images else 0.0
        now = self.clock()
        self.trained += seconds
        self.between += now - self.epoch_began - seconds
        self.epochs += 1
        self.epoch_images = 0
        self.epoch_began = now
        self._sample(self.trained)

    def _sample(self, seconds: float) -> None:
        self.samples.append((seconds, self.steps, self.images))
        while len(self.samples) > 2 and self.samples[1][0] <= seconds - self.WINDOW:
            self.samples.popleft()

    def rates(self) -> tuple[float, float] | None:
        """Return steps and images per second of training; None before the first sample."""
        (t0, steps0, images0), (t1, steps1, images1) = self.samples[0], self.samples[-1]
        if t1 <= t0 or steps1 == steps0:
            return None
        return (steps1 - steps0) / (t1 - t0), (images1 - images0) / (t1 - t0)

    def seconds_left(self, steps: int, epoch_ends: int = 0) -> float | None:
        """Return the estimated time for `steps` steps and the ends of `epoch_ends` epochs."""
        if (rates := self.rates()) is None:
            return None
        return steps / rates[0] + epoch_ends * self.between / max(self.epochs, 1)


class ConsoleCallback(Callback):
    """Shows a progress bar for the run and one for the epoch, with the metrics of the last epoch.

    If the output is not a terminal, prints a line per epoch.

    Args:
        console: where to print.
        clock: returns the time in seconds.

    Example:
        >>> callback = ConsoleCallback(Console(width=100), clock=lambda: 0.0)
        >>> callback.begin(Config(epochs=1), steps=2, done=0, run=RunDirectory("runs/a"))
        >>> metrics = {"epoch": 1, "train_loss": 0.5, "val_acc": 0.875, "sparsity": 0.9}
        >>> callback.epoch(metrics | {"images_per_s": 1000.0})
        feather  epoch 1/1  loss 0.500  val 87.50... sparsity 90.00...  1,000 images/s  -:--:-- left
        >>> callback.end()
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.perf_counter) -> None:
        self.console = console
        self.clock = clock
        self.progress: Progress | None = None
        self.shown: bool | None = None  # whether the terminal showed control characters before

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
        self.name, self.epochs = config.method, config.epochs
        self.steps, self.epoch_steps = steps, steps // config.epochs
        self.done, self.ended = done, done // self.epoch_steps
        self.accuracy = self.note = ""
        self.measure = f" {MEAN_AVERAGE_PRECISION}" if config.loss == "binary" else ""
        self.pace = Pace(self.clock)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", style="progress.remaining"),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            expand=True,
            disable=not self.console.is_interactive,
        )
        self.run_bar = self.progress.add_task(self.name, total=self.epochs, left="", note="")
        self.epoch_bar = self.progress.add_task("", total=self.epoch_steps, left="", note="")
        self._show()
        if self.console.is_interactive:
            self.shown = control_characters_shown(None, False)
        self.progress.start()

    def step(self, images: int) -> None:
        self.done += 1
        if self.pace.step(images):
            self._show()

    def epoch(self, metrics: dict[str, Any]) -> None:
        self.ended = metrics["epoch"]
        self.pace.end_epoch(metrics["images_per_s"])
        accuracy = ""
        for key, name in (("test_acc", "test"), ("val_acc", "val")):
            if metrics.get(key) is not None:
                accuracy = f"  {name}{self.measure} {percent(metrics[key])}"
        self.accuracy = accuracy or self.accuracy  # not every epoch is evaluated
        loss = f"loss {metrics['train_loss']:.3f}"
        sparsity = f"  sparsity {percent(metrics['sparsity'])}"
        self.note = loss + self.accuracy + sparsity
        self._show()
        if not self.console.is_interactive:
            self.message(
                f"{self.name:<8} epoch {self.ended}/{self.epochs}  {loss}{accuracy}{sparsity}"
                f"  {metrics['images_per_s']:,.0f} images/s  {self._run_left()} left"
            )

    def end(self, results: dict[str, Any] | None = None) -> None:
        if self.progress is not None:
            self._show()
            self.progress.stop()
            self.progress = None
            if self.shown is not None:
                control_characters_shown(None, self.shown)
                self.shown = None

    def _show(self) -> None:
        assert self.progress is not None
        rates = self.pace.rates()
        speed = f"{rates[1]:,.0f} images/s" if rates else ""
        number = min(self.ended + 1, self.epochs)
        done = self.done - (number - 1) * self.epoch_steps
        left = _duration(self.pace.seconds_left(self.epoch_steps - done))
        self.progress.update(
            self.run_bar,
            completed=self.done / self.epoch_steps,
            left=f"{self._run_left()} left",
            note=speed,
        )
        self.progress.update(
            self.epoch_bar,
            description=f"epoch {number}",
            completed=done,
            left=f"{left} left",
            note=self.note,
        )

    def _run_left(self) -> str:
        steps, epoch_ends = self.steps - self.done, self.epochs - self.ended
        return _duration(self.pace.seconds_left(steps, epoch_ends))


def _duration(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


def percent(fraction: float) -> str:
    """Return a fraction as reports show it; only 0 and 1 are shown as 0% and 100%.

    Args:
        fraction: from 0 to 1.

    Example:
        >>> percent(0.95), percent(1.0), percent(0.99999)
        ('95.00 %', '100.00 %', '99.99 %')
    """
    return percent_of(*fraction.as_integer_ratio())


def layer_table(report: dict[str, Any]) -> Text:
    """Return the layers of report.json as `Report` prints them, with empty layers in red.

    Args:
        report: the value of `report` in report.json, also of version 0.1.

    Example:
        >>> import torch, torch_feather as feather
        >>> model = torch.nn.Linear(4, 2)
        >>> with torch.no_grad():
        ...     _ = model.weight[0].zero_()
        >>> print(layer_table(feather.report(model).to_dict()))
        layer   shape  weights  zeros  sparsity
        ---------------------------------------
        weight  2x4          8      4   50.00...
    """
    keys = [field.name for field in fields(LayerReport)]
    layers, others = (
        [LayerReport(**{key: row[key] for key in keys}) for row in report.get(name, [])]
        for name in ("layers", "others")
    )
    names = [field.name for field in fields(Report) if field.name not in ("layers", "others")]
    values: dict[str, Any] = {
        key: report.get(key, report.get(OLD_KEYS.get(key, ""))) for key in names
    }
    text = Text(str(Report(layers, **values, others=others)))
    text.highlight_regex(r"\A.*", "bold")
    text.highlight_regex(re.compile(f"^.*{EMPTY_MARK}$", re.MULTILINE), "bold red")
    return text


def print_results(console: Console, results: dict[str, Any], run: object) -> None:
    """Print the table of layers, then accuracy, size and duration.

    Args:
        console: where to print.
        results: the content of report.json.
        run: the run directory, printed last.

    Example:
        >>> import torch, torch_feather as feather
        >>> layers = feather.report(torch.nn.Linear(4, 2)).to_dict()
        >>> results = {"method": "feather", "test_accuracy": 0.9, "seconds": 60.0, "report": layers}
        >>> results |= {"macs": {"dense": 8, "sparse": 8}}
        >>> print_results(Console(width=100), results, "runs/a")
        <BLANKLINE>
        layer   shape  weights  zeros  sparsity
        ...
                              test accuracy  non-zero weights  multiply-adds  training time
        feather 0... sparse      90.00...                     8              8           60 s
        <BLANKLINE>
        runs/a
    """
    console.print()
    console.print(layer_table(results["report"]), soft_wrap=True)
    console.print()
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    measure = f"test {measure_name(results.get('multi_label'))}"
    for heading in (measure, "non-zero weights", "multiply-adds", "training time"):
        table.add_column(heading, justify="right")
    report, macs = results["report"], results["macs"]
    nonzero = report["weights"] - report["zeros"]
    table.add_row(
        escape(f"{results['method']} {percent(report['sparsity'])} sparse"),
        percent(results["test_accuracy"]),
        f"{nonzero:,}",
        f"{macs['sparse']:,}",
        f"{results['seconds']:.0f} s",
    )
    if dense := results.get("dense"):
        table.add_row(
            "dense baseline",
            percent(dense["test_accuracy"]),
            f"{report['weights']:,}",
            f"{macs['dense']:,}",
            f"{dense['seconds']:.0f} s",
        )
    console.print(table)
    console.print(f"\n{run}", highlight=False, markup=False, soft_wrap=True)

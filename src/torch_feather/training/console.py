"""What `feather` shows in a terminal."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..report import EMPTY_MARK, LayerReport, Report
from ..report import percent as percent_of
from .config import Config
from .loop import Watch


class ConsoleWatch(Watch):
    """A progress bar for the steps, and the last epoch's numbers beside it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None

    def message(self, text: str) -> None:
        """Print it above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, config: Config, steps: int, done: int) -> None:
        """Show the bar."""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        name = f"{config.method:<8}"
        self.task = self.progress.add_task(name, total=steps, completed=done, note="")
        self.epochs = config.epochs
        self.progress.start()

    def step(self) -> None:
        """Advance the bar."""
        assert self.progress is not None
        self.progress.advance(self.task)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Show the epoch's numbers; one line each where the output is no terminal."""
        note = f"epoch {metrics['epoch']}/{self.epochs}  loss {metrics['train_loss']:.3f}"
        if metrics["val_acc"] is not None:
            note += f"  val {percent(metrics['val_acc'])}"
        note += f"  sparsity {percent(metrics['sparsity'])}"
        assert self.progress is not None
        self.progress.update(self.task, note=note)
        if not self.console.is_terminal:
            note += f"  {metrics['images_per_s']:.0f} images/s"
            self.message(f"{self.progress.tasks[0].description} {note}")

    def end(self) -> None:
        """Leave the bar as it is."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def percent(share: float) -> str:
    """A share as reports show it: `0.95` is 95.00 %, and 0.99996 is not yet 100.00 %."""
    return percent_of(*share.as_integer_ratio())


def layer_table(report: dict[str, Any]) -> Text:
    """The per-layer part of report.json as `Report` shows it; empty layers are red."""
    keys = [field.name for field in fields(LayerReport)]
    layers = [LayerReport(**{key: row[key] for key in keys}) for row in report["layers"]]
    text = Text(str(Report(layers, report["dense_macs"], report["sparse_macs"])))
    text.highlight_regex(r"\A.*", "bold")
    text.highlight_regex(re.compile(f"^.*{EMPTY_MARK}$", re.MULTILINE), "bold red")
    return text


def print_results(console: Console, results: dict[str, Any], run: object) -> None:
    """The per-layer report, then the numbers that matter."""
    console.print()
    console.print(layer_table(results["report"]), soft_wrap=True)
    console.print()
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for heading in ("test accuracy", "weights left", "multiply-adds", "training"):
        table.add_column(heading, justify="right")
    report, macs = results["report"], results["macs"]
    left = report["weights"] - report["zeros"]
    table.add_row(
        f"{results['method']} {percent(report['sparsity'])} sparse",
        percent(results["test_accuracy"]),
        f"{left:,}",
        f"{macs['sparse']:,}",
        f"{results['seconds']:.0f} s",
    )
    if dense := results.get("dense"):
        table.add_row(
            "dense, same budget",
            percent(dense["test_accuracy"]),
            f"{report['weights']:,}",
            f"{macs['dense']:,}",
            f"{dense['seconds']:.0f} s",
        )
    console.print(table)
    console.print(f"\n{run}", highlight=False, markup=False, soft_wrap=True)

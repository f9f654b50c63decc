"""Files of a run directory and of a study, read by what reads them.

An input is the name of the file, a newline, and its content. For `checkpoint` the content is a
JSON text of edits of a checkpoint, which is then whole.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

import torch_feather as feather
from torch_feather.studies.runs import Run, read_rows, row_matches, row_of
from torch_feather.training import loop, train
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.checkpoint_files import newest, structure
from torch_feather.training.config import apply, load_config, resolve_config
from torch_feather.training.console import print_results
from torch_feather.training.data import load_dataset
from torch_feather.training.errors import Interrupted
from torch_feather.training.restore import restore
from torch_feather.training.task import Task
from torch_feather.training.weights import read_weights

from ..mutate import VALUES, mutate_bytes, mutate_tree
from .base import Target, refused
from .states import SPECIAL, apply_edit

SETTINGS = {
    **{
        "network": "tiny",
        "epochs": 2,
        "batch_size": 512,
        "compare_dense": False,
        "track_masks": True,
    },
    **{"data.resolution": 4, "data.shift": 1, "system.threads": 1, "system.tensorboard": False},
    "system.checkpoint_steps": 1,
}
LAST = "checkpoints/last.pt"


class _Tiny(nn.Module):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


class RunDirectories(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        feather.models._MODELS["tiny"] = _Tiny
        loop._plot = lambda *details: None
        self.config = apply(resolve_config("digits"), SETTINGS, "fuzz")
        self.finished, self.stopped = folder / "finished", folder / "stopped"
        train(self.config, self.finished)
        with contextlib.suppress(Interrupted):
            train(self.config, self.stopped, callback=_StopAt(4))
        self.rows = folder / "runs.json"
        self.run = Run("run", load_config(self.finished / "config.yaml"), "label")
        self.rows.write_text(json.dumps([row_of(self.run, RunDirectory(self.finished))]))
        self.data = load_dataset(self.config.data, self.config.seed)
        self.state = torch.load(self.stopped / LAST, weights_only=True)
        self.right = {
            "report.json": self.finished / "report.json",
            "metrics.jsonl": self.finished / "metrics.jsonl",
            "config.yaml": self.finished / "config.yaml",
            "model.safetensors": self.finished / "model.safetensors",
            "masks/0001.npy": self.finished / "masks" / "0001.npy",
            "runs.json": self.rows,
            LAST: self.stopped / LAST,
        }
        self.contents = {name: file.read_bytes() for name, file in self.right.items()}

    def seeds(self) -> list[bytes]:
        found = [name.encode() + b"\n" + content for name, content in self.contents.items()]
        return [*found, b"checkpoint\n[]"] * 2

    def mutate(self, rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
        name, _, rest = content.partition(b"\n")
        pieces = [other.partition(b"\n")[2] for other in others[-50:]]
        try:
            if name == b"checkpoint":
                return name + b"\n" + _edits(rng, json.loads(rest))
            if rng.random() < 0.7 and name.endswith((b".json", b".jsonl", b".yaml")):
                return name + b"\n" + _mutate_text(rng, name, rest)
        except Exception:  # not such a text any more
            pass
        return name + b"\n" + mutate_bytes(rng, rest, pieces)

    def check(self, content: bytes) -> bool:
        raw, _, rest = content.partition(b"\n")
        name = raw.decode("ascii", "replace")
        if name == "checkpoint":
            try:
                edits = json.loads(rest)
            except (ValueError, RecursionError):
                return False
            return isinstance(edits, list) and self._resume(self._edited(edits))
        file = self.right.get(name)
        if file is None:
            return False
        if name == LAST:
            return self._resume(rest)
        file.write_bytes(rest)
        try:
            results = [refused(door) for door in self._doors(name)]
        finally:
            file.write_bytes(self.contents[name])
        return not all(results)

    def _doors(self, name: str) -> list[Any]:
        run = RunDirectory(self.finished)
        console = Console(file=io.StringIO(), width=100)
        report = lambda: print_results(console, run.read_report(), run.path)  # noqa: E731
        row = lambda: row_of(self.run, run)  # noqa: E731
        model = lambda: read_weights(run.path).fill(_Tiny(10, 1))  # noqa: E731
        check = lambda: run.check(self.config, resume=True)  # noqa: E731
        load = lambda: run.load_model(_Tiny(10, 1))  # noqa: E731
        rows = lambda: [row_matches(row, self.run) for row in read_rows(self.rows)]  # noqa: E731
        return {
            "report.json": [report, row, model, run.prunable, check],
            "metrics.jsonl": [run.read_metrics, row, check],
            "config.yaml": [run.read_config, model, check, run.stored_config],
            "model.safetensors": [load, model],
            "masks/0001.npy": [row],
            "runs.json": [rows],
        }[name]

    def _edited(self, edits: list[Any]) -> bytes:
        """Return a checkpoint with edits, and with the hash of its structure."""
        state = copy.deepcopy(self.state)
        for edit in edits:
            apply_edit(state, edit)
        try:
            state.pop("structure", None)
            state["structure"] = structure(state)
            stream = io.BytesIO()
            torch.save(state, stream)
        except Exception:  # a value that cannot be stored
            return b""
        return stream.getvalue()

    def _resume(self, content: bytes) -> bool:
        file = self.stopped / LAST
        file.write_bytes(content)

        def resume() -> None:
            found = newest([file], {})
            task = Task(self.config, self.data, torch.device("cpu"))
            restore(task, found.state)
            task.fit(RunDirectory(self.stopped), feather.training.callbacks.Callback())

        try:
            return not refused(resume)
        finally:
            for left in self.stopped.glob("checkpoints/*"):
                left.unlink()
            shutil.rmtree(self.stopped / "masks", ignore_errors=True)


class _StopAt(feather.training.callbacks.Callback):
    """Stop at a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, images: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted("stopped")


def _mutate_text(rng: Random, name: bytes, content: bytes) -> bytes:
    if name.endswith(b".yaml"):
        return yaml.safe_dump(mutate_tree(rng, yaml.safe_load(content))).encode()
    if name.endswith(b".jsonl"):
        lines = mutate_tree(rng, [json.loads(line) for line in content.splitlines()])
        return "\n".join(json.dumps(line) for line in lines).encode()
    return json.dumps(mutate_tree(rng, json.loads(content))).encode()


def _edits(rng: Random, edits: list[Any]) -> bytes:
    edits = edits[:5]
    if edits and rng.random() < 0.4:
        edits.pop(rng.randrange(len(edits)))
    for _ in range(rng.choice((1, 1, 2))):
        path = [rng.randrange(20) for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4)))]
        change = rng.choice(("set", "set", "set", "delete", "rename", "copy"))
        edits.append([change, path, rng.choice(SPECIAL if rng.random() < 0.5 else VALUES)])
    return json.dumps(edits).encode()

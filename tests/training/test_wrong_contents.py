"""Files of a run directory that are whole but wrong, each read by each command that reads it.

A command succeeds, or it ends with one of the package's errors, whose message is one line that
names the file. Then no file has changed.
"""

import copy
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_callbacks import StopAt

import torch_feather as feather
from torch_feather.cli import make_app
from torch_feather.errors import FeatherError
from torch_feather.studies import runs as study_runs
from torch_feather.studies.runs import Run, read_rows, row_of
from torch_feather.training import loop
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.checkpoint_files import structure
from torch_feather.training.config import apply, load_config, resolve_config
from torch_feather.training.data import load_dataset
from torch_feather.training.errors import Interrupted
from torch_feather.training.loop import train
from torch_feather.training.provenance import provenance
from torch_feather.training.schemas import RESULTS

DEEP = "[" * 100_000 + "]" * 100_000
WHOLE = [b"", b"{}", b"[]", b"null", b"3", b'"text"', b"NaN", b"{", b"\0\xff\x80", b"9" * 5000]
WHOLE += [DEEP.encode(), b'{"a": ' * 50_000 + b"}" * 50_000]
WRONG = [None, {}, [], "text", True, -1, 2.5, 10**30, math.nan, math.inf, [[1]], "\x1b[2J"]


class TinyNetwork(torch.nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4 * 16, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setitem(feather.models._MODELS, "tiny", TinyNetwork)


SETTINGS = {
    **{"network": "tiny", "epochs": 2, "batch_size": 512, "compare_dense": False},
    **{"data.resolution": 4, "data.shift": 1, "system.threads": 1, "system.tensorboard": False},
    **{"system.checkpoint_steps": 1, "track_masks": True},
}


def tiny():
    return apply(resolve_config("digits"), SETTINGS, "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run, and the same run stopped one step before its end."""
    folder = tmp_path_factory.mktemp("made")
    feather.models._MODELS["tiny"] = TinyNetwork
    train(tiny(), folder / "finished")
    with pytest.raises(Interrupted):
        train(tiny(), folder / "stopped", callback=StopAt(5))
    del feather.models._MODELS["tiny"]
    return folder


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Positions within nested lists and mappings.

    Of a list, the first and the last entry; of the settings, which are read key by key, a few.
    """
    if isinstance(value, dict):
        keys = list(value)[:: 20 if at[-1:] == ("config",) else 1]
    else:
        keys = sorted({0, len(value) - 1}) if isinstance(value, list) and value else []
    for key in keys:
        yield (*at, key)
        yield from paths(value[key], (*at, key))


def replaced(value: Any, path: tuple, new: Any = None, remove: bool = False) -> Any:
    """A copy with another value at a position; tensors are shared."""
    if not path:
        return new
    changed = copy.copy(value)
    if remove and len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = replaced(value[path[0]], path[1:], new, remove)
    return changed


def mutations(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value with each position missing or of another kind, with a name for messages."""
    for path in paths(value):
        name = ".".join(map(str, path))
        yield f"{name} missing", replaced(value, path, remove=True)
        for wrong in WRONG:
            yield f"{name} = {wrong!r}", replaced(value, path, wrong)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def outcome(monkeypatch, capsys):
    """Run a command; return its error, checked, or None."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, file=None, cause=""):
        monkeypatch.setattr(sys, "argv", ["feather", *map(str, arguments)])
        try:
            make_app([str(one) for one in arguments])()
        except SystemExit as done:
            code, message = done.code, None
        except FeatherError as error:
            code, message = 0, str(error)
        except Exception as error:
            raise AssertionError(f"{cause}: {arguments} raised {error!r}") from error
        assert code in (0, None), (cause, capsys.readouterr())
        assert "\x1b" not in capsys.readouterr().out, cause
        if message is not None:
            assert message.count("\n") == 0, (cause, message)
            assert len(message) < 1000, (cause, message)
            assert str(file) in message, (cause, message)
        return message

    return run


@pytest.mark.slow
def test_every_wrong_report_is_shown_right_or_refused_in_one_line(made, tmp_path, outcome):
    folder = tmp_path / "run"
    shutil.copytree(made / "finished", folder)
    file, refused = folder / "report.json", 0
    results = json.loads(file.read_text())
    wrong = [(repr(content[:20]), content) for content in WHOLE]
    wrong += [(name, json.dumps(value).encode()) for name, value in mutations(results)]
    for cause, content in wrong:
        file.write_bytes(content)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        error = outcome("report", folder, file=file, cause=cause)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        if error is not None:
            refused += 1
            assert "--resume --out" in error, error
    assert refused > 300
    file.unlink()
    os.mkfifo(file)
    assert "not a regular file" in outcome("report", folder, file=file)


# What the schema accepts at each position is accepted by every other command too, so that fewer
# mutations are enough for those that take longer.
@pytest.mark.parametrize("command", ["export", "export --format onnx", "evaluate", "train"])
@pytest.mark.slow
def test_no_command_fails_on_a_wrong_file_with_another_error(made, tmp_path, outcome, command):
    folder = tmp_path / "run"
    shutil.copytree(made / "finished", folder)
    name, *options = command.split()
    arguments = [name, folder, *options, "--out", folder / "exported"]
    if name == "evaluate":
        arguments = [name, folder]
    if name == "train":
        arguments = [name, "--resume", "--out", folder]
    read = {"report.json", "config.yaml", "model.safetensors"}
    read -= {"train": {"model.safetensors"}, "evaluate": {"report.json"}}.get(name, set())
    read -= {"export": {"config.yaml"}}.get(name, set()) & set(options)
    for file_name in sorted(read):
        file = folder / file_name
        right = file.read_bytes()
        before = contents(folder)
        for content in [*WHOLE, right[: len(right) // 2], b"# only a comment\n"]:
            file.write_bytes(content)
            error = outcome(*arguments, file=file, cause=f"{file_name} is {content[:20]!r}")
            if error is None:  # an empty configuration is one with the defaults
                (folder / "exported").unlink(missing_ok=True)
                continue
            assert contents(folder) == before | {file_name: content}, content[:20]
        file.write_bytes(right)


def test_the_hints_of_a_finished_run_work(made, tmp_path, outcome):
    folder = tmp_path / "run"
    shutil.copytree(made / "finished", folder)
    before = contents(folder)
    report, metrics = folder / "report.json", folder / "metrics.jsonl"
    for wrong in (report, metrics):
        wrong.write_text("{}")
        error = outcome("train", "--resume", "--out", folder, file=wrong)
        assert "Move report.json and metrics.jsonl away and resume with" in error
        report.unlink()
        metrics.unlink()
        assert outcome("train", "--resume", "--out", folder) is None
        after = contents(folder)
        for name in ("model.safetensors", "metrics.jsonl", "config.yaml"):
            assert after[name] == before[name]
        results = [json.loads(files["report.json"])["report"] for files in (before, after)]
        assert results[0] == results[1]
    (folder / "config.yaml").unlink()
    error = outcome("evaluate", folder, file=folder / "config.yaml")
    assert "which restores it" in error
    assert outcome("train", "--resume", "--out", folder) is None
    assert contents(folder)["config.yaml"] == before["config.yaml"]


@pytest.mark.parametrize("kind", ["curves", "masks"])
def test_wrong_metrics_and_masks_are_refused_by_the_plots_and_by_a_study(
    made, tmp_path, outcome, kind
):
    folder = tmp_path / "run"
    shutil.copytree(made / "finished", folder)
    run = Run("run", load_config(folder / "config.yaml"), "label")
    assert row_of(run, RunDirectory(folder))["zeros"] > 0
    wrong: list[tuple[str, bytes]] = [(repr(c[:20]), c) for c in WHOLE]
    if kind == "curves":
        file = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        wrong += [
            (name, "\n".join(json.dumps(line) for line in value).encode())
            for name, value in mutations(lines)
            if isinstance(value, list)
        ]
        wrong += [("lines", b"\n".join(json.dumps(line).encode() for line in reversed(lines)))]
    else:
        file = folder / "masks" / "0001.npy"
        for i, array in enumerate(
            [np.zeros(3, np.uint8), np.zeros((9, 9), np.uint8), np.zeros(85), np.array(3, np.uint8)]
        ):
            np.save(tmp_path / f"{i}.npy", array)
            wrong.append((f"array {i}", (tmp_path / f"{i}.npy").read_bytes()))
        header = file.read_bytes()[:128].replace(b"(", b"(9999999", 1)
        wrong.append(("a huge shape", header + b"\0"))
    refused = 0
    for cause, content in wrong:
        file.write_bytes(content)
        refused += error_of(lambda: row_of(run, RunDirectory(folder)), file, cause) is not None
    assert refused >= len(wrong) // 2
    file.write_bytes(b"{}")
    assert outcome("train", "--resume", "--out", folder, file=file) is not None


def test_every_wrong_row_of_a_study_is_refused_or_answered(made, tmp_path):
    config = load_config(made / "finished" / "config.yaml")
    row = row_of(Run("run", config, "a label"), RunDirectory(made / "finished"))
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([row]))
    assert read_rows(file) == [row]
    wrong = [(repr(content[:20]), content) for content in WHOLE]
    wrong += [(name, json.dumps([value]).encode()) for name, value in mutations(row)]
    refused = 0
    for cause, content in wrong:
        file.write_bytes(content)
        if error_of(lambda: read_rows(file), file, cause) is not None:
            refused += 1
            continue
        for one in read_rows(file):
            study_runs.row_matches(one, Run("run", config, "a label"))
    assert refused > 200


def error_of(call, file, cause: str) -> str | None:
    """The message of the package's error, one line that names the file; None without error."""
    try:
        call()
        return None
    except FeatherError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{cause} raised {error!r}") from error
    assert "\n" not in message, cause
    assert str(file) in message, cause
    return message


class Messages(feather.training.callbacks.Callback):
    def __init__(self):
        self.found = []

    def message(self, text):
        self.found.append(text)


def tensors(value: torch.Tensor) -> Iterator[Any]:
    """Values that are no such tensor."""
    yield from (None, "text", [], 3)
    yield torch.zeros(7, 3)
    yield value.to(torch.float64 if value.dtype != torch.float64 else torch.float32)
    if value.ndim > 0:
        yield value[:0]


def states(state: dict) -> Iterator[tuple[str, Any]]:
    """Wrong states: every position missing or of another kind, once for each kind of position."""
    yield from ((f"state = {wrong!r}", wrong) for wrong in ([], None, "text", torch.zeros(3)))
    done = set()
    for path in paths(state):
        value = state
        for key in path:
            value = value[key]
        # One parameter of each number of dimensions stands for the others.
        kind = (path[0], path[-1] if path[0] not in ("model",) else None)
        kind += (value.ndim if isinstance(value, torch.Tensor) else None,)
        kind += (len(path),)
        if kind in done:
            continue
        done.add(kind)
        name = ".".join(map(str, path))
        yield f"{name} missing", replaced(state, path, remove=True)
        for wrong in tensors(value) if isinstance(value, torch.Tensor) else WRONG[::3]:
            yield f"{name} = {wrong!r}"[:80], replaced(state, path, wrong)


@pytest.mark.slow
def test_from_every_wrong_checkpoint_the_run_ends_with_the_same_bits(made, tmp_path, monkeypatch):
    """The wrong value does no harm, or the checkpoint before is taken, with a warning."""
    monkeypatch.setattr(loop, "_plot", lambda *details: None)
    data = load_dataset(tiny().data, tiny().seed)
    monkeypatch.setattr(loop, "load_dataset", lambda *details: data)
    # What takes the most time, and does not matter here: git, and forcing files to disk.
    facts = provenance(torch.device("cpu"))
    monkeypatch.setattr("torch_feather.training.results.provenance", lambda device: facts)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    expected = (made / "finished" / "model.safetensors").read_bytes()
    right = torch.load(made / "stopped" / "checkpoints" / "last.pt", weights_only=True)
    del right["structure"]  # as version 0.1; with it, every change of the structure is noticed
    previous, count = 0, 0
    for cause, state in states(right):
        if cause.startswith("optimizer.state.") and cause.endswith("missing"):
            continue  # as of a weight without gradients
        folder = tmp_path / "run"
        shutil.copytree(made / "stopped", folder)
        last = folder / "checkpoints" / "last.pt"
        torch.save(state, last)
        wrong, messages = last.read_bytes(), Messages()
        count += 1
        resume = partial(train, tiny(), folder, resume=True, callback=messages)
        error = error_of(resume, "", cause)
        if error is not None:  # a format, method, teacher, settings or images of another run
            assert re.search("format|method|teacher|other settings|images have changed", error), (
                cause
            )
            assert last.read_bytes() == wrong
        else:
            assert (folder / "model.safetensors").read_bytes() == expected, cause
            kept = last.with_suffix(".damaged")
            warned = [text for text in messages.found if f"{last}: " in text]
            assert len(warned) == kept.exists(), cause
            if warned:
                previous += 1
                assert kept.read_bytes() == wrong
        shutil.rmtree(folder)
    assert previous > count // 2


def test_every_change_of_a_new_checkpoint_is_noticed(made):
    """A value that fits everywhere, such as a removed momentum, would change the bits."""
    file = made / "stopped" / "checkpoints" / "last.pt"
    right = torch.load(file, weights_only=True)
    saved = right.pop("structure")
    assert structure(right) == saved
    changed = list(states(right))
    assert len(changed) > 200
    for cause, state in changed:
        same = cause.endswith((" = None", " = True", " = 2.5")) and structure(state) == saved
        assert same or structure(state) != saved, cause


def test_without_a_right_checkpoint_nothing_is_changed(made, tmp_path, outcome):
    folder = tmp_path / "run"
    shutil.copytree(made / "stopped", folder)
    checkpoints = folder / "checkpoints"
    for name, key in (("last.pt", "images"), ("previous.pt", "model")):
        state = torch.load(checkpoints / name, weights_only=True)
        del state[key], state["structure"]
        torch.save(state, checkpoints / name)
    before = contents(folder)
    error = outcome("train", "--resume", "--out", folder, file=checkpoints)
    assert "last.pt: lacks images" in error
    assert "previous.pt: lacks model" in error
    assert contents(folder) == before


def test_a_lost_configuration_is_restored_from_the_checkpoint(made, tmp_path, outcome):
    folder = tmp_path / "run"
    shutil.copytree(made / "stopped", folder)
    stored = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text("epochs: [1")
    error = outcome("train", "--resume", "--out", folder, file=folder / "config.yaml")
    assert "move it away and resume with" in error
    (folder / "config.yaml").unlink()
    assert outcome("train", "--resume", "--out", folder) is None
    assert (folder / "config.yaml").read_text() == stored
    expected = (made / "finished" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == expected


def test_without_settings_in_the_checkpoint_they_can_be_given_again(made, tmp_path, outcome):
    folder = tmp_path / "run"
    shutil.copytree(made / "stopped", folder)
    (folder / "config.yaml").unlink()
    for name in ("last.pt", "previous.pt"):
        state = torch.load(folder / "checkpoints" / name, weights_only=True)
        del state["config"], state["structure"]
        torch.save(state, folder / "checkpoints" / name)
    resume = ["train", "--resume", "--out", folder]
    error = outcome(*resume, file=folder / "config.yaml")
    assert "feather train --resume --recipe NAME --KEY VALUE --out" in error
    flags = ["--no-compare-dense", "--track-masks"]
    settings = {k: v for k, v in SETTINGS.items() if k not in ("compare_dense", "track_masks")}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    given = [word for key, text in texts.items() for word in (f"--{key}", text)] + flags
    assert outcome(*resume, "--recipe", "digits", *given) is None
    expected = (made / "finished" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == expected


def test_a_model_without_its_checkpoint_and_report_is_not_overwritten(made, tmp_path, outcome):
    folder = tmp_path / "run"
    shutil.copytree(made / "finished", folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "report.json").unlink()
    before = contents(folder)
    error = outcome("train", "--resume", "--out", folder, file=folder)
    assert "Choose another --out" in error
    (folder / "metrics.jsonl").unlink()
    assert "already holds a run" in outcome("train", "--out", folder, file=folder)
    del before["metrics.jsonl"]
    assert contents(folder) == before


@pytest.mark.parametrize(
    "file", [*Path(__file__).parents[2].glob("results/**/report.json")][:20] or [None], ids=str
)
def test_published_reports_pass(file):
    if file is None:
        pytest.skip("no published reports")
    RESULTS(json.loads(file.read_text()), "")

"""Training with methods of other packages: `--method module:factory`, registered, entry points."""

import importlib
import re
import sys
from importlib import metadata

import pytest
from training_callbacks import StopAt

import torch_feather as feather
from torch_feather.cli import main
from torch_feather.cli.training import free_directory
from torch_feather.errors import ConfigurationError
from torch_feather.methods import registry
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, apply, load_config, resolve_config, to_yaml
from torch_feather.training.errors import CheckpointError, Interrupted
from torch_feather.training.loop import train
from torch_feather.training.task import Task

NAME = "own_methods:steep"
MODULE = '''
from torch_feather.methods.feather import feather


def steep(*, sparsity, p=8.0, schedule="cubic", note=object()):
    """`feather` with a steeper threshold."""
    return feather(sparsity=sparsity, p=p, schedule=schedule)
'''
QUICK = {"network": "resnet8", "sparsity": 0.8, "epochs": 1, "batch_size": 512,
         "compare_dense": False, "system.threads": 1}  # fmt: skip


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A method in a file of the current folder, which is not on the import path."""
    (tmp_path / "own_methods.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_methods", None)
    importlib.invalidate_caches()


@pytest.fixture
def importable(module, monkeypatch):
    monkeypatch.syspath_prepend(module)
    return module


def config(**changes):
    return apply(resolve_config("digits"), QUICK | {"method": NAME} | changes, "test")


def run_feather(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["feather", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


# --- without the lookup of the core


def test_a_configuration_with_an_own_method_survives_a_round_trip_through_yaml(tmp_path):
    own = Config(method="package.module:factory", options={"theta": "linear(1, 0)"})
    (tmp_path / "config.yaml").write_text(to_yaml(own))
    assert load_config(tmp_path / "config.yaml") == own


def test_the_run_directory_of_an_own_method_has_a_portable_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = free_directory(Config(method="package.module:factory", network="timm/resnet18"))
    assert folder.parent.name == "runs"
    assert re.fullmatch(r"[\w.+-]+", folder.name)
    assert {"package.module", "factory", "resnet18"} <= set(re.split("[_-]", folder.name))


def test_a_checkpoint_of_another_method_is_not_loaded(tmp_path):
    with pytest.raises(Interrupted):
        train(config(method="feather"), tmp_path / "run", callback=StopAt(1))
    state = RunDirectory(tmp_path / "run").load()
    assert state["method"] == "feather"

    class Loaded(Task):
        def load_state_dict(self, state):
            super().load_state_dict(state | {"method": NAME})

    with pytest.raises(CheckpointError, match=f"of method {NAME}, not feather"):
        train(config(method="feather"), tmp_path / "run", resume=True, make_task=Loaded)


# --- with the lookup of the core


def test_an_own_method_trains_with_its_options(importable, tmp_path):
    results = train(config(**{"options.p": 2.0}), tmp_path / "run")
    assert results["method"] == NAME
    assert results["report"]["zeros"] == round(0.8 * results["report"]["weights"])
    stored = RunDirectory(tmp_path / "run").read_config()
    assert stored.method == NAME
    # The defaults of the factory; an object cannot be stored, so the factory decides again.
    assert stored.options == {"p": 2.0, "schedule": "cubic"}


@pytest.mark.slow
def test_a_run_with_an_own_method_resumes_bitwise_identically(importable, tmp_path):
    train(config(epochs=2), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config(epochs=2), tmp_path / "run", callback=StopAt(4))
    assert RunDirectory(tmp_path / "run").load()["method"] == NAME
    train(config(epochs=2), tmp_path / "run", resume=True)
    whole, resumed = (RunDirectory(tmp_path / name).model_file for name in ("whole", "run"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_resuming_without_the_own_method_is_an_error_that_names_it(importable, tmp_path):
    with pytest.raises(Interrupted):
        train(config(), tmp_path / "run", callback=StopAt(1))
    (importable / "own_methods.py").unlink()
    sys.modules.pop("own_methods", None)
    importlib.invalidate_caches()
    with pytest.raises(ConfigurationError, match="own_methods") as caught:
        train(config(), tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)


def test_the_command_finds_an_own_method_in_the_current_folder(module, monkeypatch, capsys):
    quick = ["--epochs", "1", "--batch-size", "512", "--no-compare-dense"]
    code, output, errors = run_feather(monkeypatch, capsys, "train", "--method", NAME, *quick)
    assert code == 0, errors
    (folder,) = (module / "runs").iterdir()
    assert RunDirectory(folder).read_config().method == NAME
    code, output, errors = run_feather(monkeypatch, capsys, "report", folder)
    assert (code, NAME in output) == (0, True), errors


@pytest.mark.parametrize("name", ["own_methods:missing", "nowhere.to_be.found:factory"])
def test_an_own_method_that_cannot_be_imported_is_a_one_line_error(
    module, monkeypatch, capsys, name
):
    code, _, errors = run_feather(monkeypatch, capsys, "train", "--method", name)
    assert code == 1
    assert name.partition(":")[0] in errors
    assert errors.count("\n") == 1


def test_registered_methods_are_listed_with_their_options(importable, monkeypatch, capsys):
    own = importlib.import_module("own_methods")
    feather.register_method("steep", own.steep)
    try:
        _, output, _ = run_feather(monkeypatch, capsys, "methods")
        (row,) = (line for line in output.splitlines() if line.startswith("steep "))
        assert "`feather` with a steeper threshold." in row
        assert "p=8.0" in row
        results = train(config(method="steep"), importable / "run")
        assert results["method"] == "steep"
    finally:
        getattr(feather.methods, "METHODS", {}).pop("steep", None)


def test_methods_of_entry_points_are_listed(importable, monkeypatch, capsys):
    entry = metadata.EntryPoint("steep-entry", NAME, "torch_feather.methods")
    real = metadata.entry_points

    def entry_points(**selection):
        if selection.get("group") == entry.group:
            return metadata.EntryPoints([entry])
        return real(**selection)

    monkeypatch.setattr(registry, "entry_points", entry_points)
    _, output, _ = run_feather(monkeypatch, capsys, "methods")
    assert any(line.startswith("steep-entry ") for line in output.splitlines())
